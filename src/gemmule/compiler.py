"""torch.compile for functions and modules, with two workarounds for Inductor on CPUs.

Inductor compiles C++ with GCC. The functions of torch that call GCC are patched against a vectorizer of GCC that
miscompiles Inductor's kernels, and against libraries that an interrupt leaves truncated.
"""

import logging
import os
import re
import shlex
import stat
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from gemmule.code_cache import cache_folder
from gemmule.errors import TrainingError

log = logging.getLogger(__name__)

T = TypeVar("T")

# On a CPU gelu's tanh is made of exp, which takes half the time; near 0 it is off by 1e-7 and not by 1e-7 of itself.
_OPTIONS = {"cpp.use_decompose_tanh": True}

# GCC's SLP vectorizer joins scalar operations that stand side by side into vectors. GCC 11 and 12.2 get kernels wrong
# that reduce over transposed tiles: NaN or wrong gradients, where the processor is tuned for generically (-mtune) and
# OpenMP has one thread. Inductor writes its vectors itself and switches the loop vectorizer off, but not this one.
_FLAG = "fno-tree-slp-vectorize"

# Seconds in which another program may be writing a library in place.
_WRITE_SECONDS = 60
# Seconds for which what is compiled is kept unused.
_UNUSED_SECONDS = 30 * 24 * 60 * 60

# How the loader of a system says that a library is not whole.
_TRUNCATED = re.compile(
    r"(/\S+\.(?:so|dylib)): (?:file too short|invalid ELF header|cannot read file data|.*truncated)"
)


def compile_function(function: Callable[..., T], **options: Any) -> Callable[..., T]:
    """Return the function compiled when it is first called; options are those of torch.compile."""
    _patch_inductor()
    return torch.compile(function, **options)


def compile_block(block: nn.Module) -> None:
    """Compile a block of the model when it is first called."""
    _patch_inductor()
    block.compile(options=_OPTIONS)


def reason_not_to_compile(device: torch.device) -> str | None:
    """Compile a small function; return the reason why torch.compile fails on this machine, or None."""
    try:
        rebuilding(lambda: compile_function(torch.neg)(torch.ones(8, dtype=torch.float32, device=device)))
    except (RuntimeError, ImportError, OSError) as error:  # no C++ compiler, no triton, a system without either
        return str(error).strip().splitlines()[0]
    return None


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules eagerly inside the block, for shapes that occur once."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled here; asking it to load takes a second
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def rebuilding(run: Callable[[], T], retry: bool = True) -> T:
    """Run a compiled function; where the compiler's cache has truncated libraries, remove them and run it again.

    Other programs share that cache, and may have been interrupted while they linked a library. TrainingError where it
    may not `retry`, as one of several ranks.
    """
    removed: set[Path] = set()
    while True:
        try:
            return run()
        except Exception as error:
            damaged = damaged_library(error)
            if damaged is None or damaged in removed:
                raise
            damaged.unlink(missing_ok=True)
            removed.add(damaged)
            message = f"{damaged}: a truncated library in the compiler's cache is removed"
            if not retry:
                raise TrainingError(f"{message}; run the same command with --resume") from error
            log.warning(f"{message}, and compiled again")
            torch.compiler.reset()  # the failure is remembered otherwise


def damaged_library(error: BaseException) -> Path | None:
    """Return the truncated library of the compiler's cache that caused an exception, or None."""
    if not isinstance(error, RuntimeError | ImportError | OSError):
        return None
    found = _TRUNCATED.search(str(error))
    return Path(found[1]) if found and Path(found[1]).is_relative_to(_cache()) else None


def remove_truncated_libraries(cache: Path, age: float) -> None:
    """Remove truncated libraries that are older than `age` seconds.

    From some of them, Inductor would infer that the processor has no vector instructions.
    """
    recent = time.time() - age
    with suppress(OSError):
        for file in cache.glob("*/*.so"):
            if file.stat().st_mtime <= recent and not _is_whole(file):
                file.unlink(missing_ok=True)


def _remove_unused(cache: Path) -> None:
    """Remove files that were neither written nor read for a month."""
    old = time.time() - _UNUSED_SECONDS
    for file in cache.rglob("*"):
        with suppress(OSError):
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and max(status.st_atime, status.st_mtime) < old:
                file.unlink()


def _is_whole(library: Path) -> bool:
    """Whether a 64-bit library has the length that its header gives; the section table is written last."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":
        return bool(header)
    order: Literal["little", "big"] = "little" if header[5] == 1 else "big"
    sections, entry, count = (int.from_bytes(header[a:b], order) for a, b in ((40, 48), (58, 60), (60, 62)))
    return library.stat().st_size >= sections + entry * count > 0


def _cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


@cache
def _patch_inductor() -> None:
    """Patch Inductor: the GCC flag, atomic writes of libraries, a private cache, and removal of truncated libraries."""
    private = None if "TORCHINDUCTOR_CACHE_DIR" in os.environ else cache_folder()
    if private is not None:
        # torch's default is a predictable name in /tmp, where another user could plant code.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private / "inductor")  # before the import, which reads it
    try:
        from torch._inductor import codecache
        from torch._inductor import cpp_builder as builder

        flags, run = builder._get_optimization_cflags, builder.run_compile_cmd
    except (ImportError, AttributeError):  # another torch; before a run gradients are compared (train/autotune.py)
        return
    builder._get_optimization_cflags = partial(_with_flag, flags)
    builder.run_compile_cmd = partial(_run_atomically, run)
    if private is None:
        remove_truncated_libraries(_cache(), _WRITE_SECONDS)
        return
    for name, place in (("_HEADER_DIR", "headers"), ("_HEADER_LOCK_DIR", "headers/locks")):
        if hasattr(codecache, name):
            setattr(codecache, name, str(_cache() / place))
    remove_truncated_libraries(_cache(), 0)
    _remove_unused(_cache())


def _with_flag(flags: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    made = flags(*arguments, **options)
    (made[0] if isinstance(made, tuple) else made).append(_FLAG)  # Clang has it, too
    return made


def _run_atomically(run: Callable[[str, str], None], command: str, cwd: str) -> None:
    arguments = shlex.split(command)
    position = arguments.index("-o") + 1 if "-o" in arguments[:-1] else None
    if position is None:
        run(command, cwd)
        return
    target = Path(cwd, arguments[position])
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    arguments[position] = str(temporary)
    try:
        run(shlex.join(arguments), cwd)
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
