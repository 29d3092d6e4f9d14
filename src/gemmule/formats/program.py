"""A model as a C program: its source with a packed file, or one executable file with the packed file at its end."""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from gemmule.errors import DeviceError, MissingExtra, ModelError, OutputError
from gemmule.files import as_output_error, atomic_write
from gemmule.formats.packed import ALIGNMENT, MAGIC, TRAILER, save_packed
from gemmule.model.gemma3 import Gemma3
from gemmule.processes import python_module_command
from gemmule.tokenizer import Tokenizer

PACKED = "model.packed"
# What ziglang compiles for. On Linux with musl, linked statically: it does not depend on the C library of the system.
TARGETS = {
    "linux-x86_64": "x86_64-linux-musl",
    "linux-aarch64": "aarch64-linux-musl",
    "macos-aarch64": "aarch64-macos",
    "macos-x86_64": "x86_64-macos",
    "windows-x86_64": "x86_64-windows-gnu",
}

_SOURCES = Path(__file__).with_name("run")
_KERNELS = Path(__file__).parents[1] / "inference" / "native"  # the engine's own
_UNITS = ("story.c", "draw.c", "system.c")  # what is compiled; they include the others
_FILES = [_SOURCES / name for name in ("Makefile", *_UNITS, "draw.h", "packed.h", "system.h", "vocabulary.h")]
_FILES += [_KERNELS / name for name in ("step.c", "sample.c")]
# As for the engine, so that sums are the same; not for this processor alone.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas")
_TIMEOUT = 1800  # seconds; ziglang compiles a C library when it is first asked for one


def check_compiler(target: str | None) -> None:
    """Raise MissingExtra where a target needs ziglang, DeviceError where this machine has no C compiler."""
    if target is not None:
        if find_spec("ziglang") is None:
            raise MissingExtra("ziglang", "program", f"--target {target}, unlike --to c,")
    else:
        _require_compiler("--to program", "name a --target, or use --to c, which needs none")


def check_runnable(to: str, target: str | None) -> None:
    """Raise DeviceError where this machine cannot run a program for a target, or compile its source."""
    host = f"{platform.system().lower().replace('darwin', 'macos')}-{platform.machine().replace('arm64', 'aarch64')}"
    if target not in (None, host):
        raise DeviceError(f"--verify runs the program, and this machine, {host}, cannot run {target}; verify it there")
    if to == "c":
        _require_compiler("--verify", "or leave --verify out")


def _require_compiler(option: str, advice: str) -> None:
    if shutil.which(_compiler()[0]) is None:
        raise DeviceError(f"{option}: no C compiler ({_compiler()[0]}) was found; install one, {advice}")


def write_sources(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: str, name: str) -> None:
    """Write the program's C source, a Makefile and the packed file into an existing folder."""
    for file in _FILES:
        (folder / file.name).write_bytes(file.read_bytes())
    save_packed(model, tokenizer, folder / PACKED, dtype, name)


def write_program(
    model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, name: str, target: str | None = None
) -> None:
    """Write an executable file with the packed file at its end, for a target of TARGETS or this machine.

    Raises OutputError, as `check_compiler`, and ModelError where the compiler fails.
    """
    check_compiler(target)
    with ExitStack() as stack:
        try:
            with as_output_error(out):
                private = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                folder = Path(private)
                write_sources(model, tokenizer, folder, dtype, name)
        except OutputError as error:
            raise OutputError(f"{out}: what it is made of cannot be written: {error}") from None
        _join(compile_program(folder, target), folder / PACKED, out)


def _join(program: Path, packed: Path, out: Path) -> None:
    """Write a program with a packed file at its end."""
    with atomic_write(out) as temporary:
        with temporary.open("wb") as file, program.open("rb") as code, packed.open("rb") as data:
            shutil.copyfileobj(code, file)
            file.write(bytes(-program.stat().st_size % ALIGNMENT))
            shutil.copyfileobj(data, file)
            file.write(TRAILER.pack(packed.stat().st_size, MAGIC))
        mode = temporary.stat().st_mode
        temporary.chmod(mode | (mode & 0o444) >> 2)  # who may read it may run it


def compile_program(folder: Path, target: str | None = None) -> Path:
    """Compile the sources in a folder; return the program. ModelError with what the compiler says."""
    program = folder / ("story.exe" if target == "windows-x86_64" else "story")
    command = (
        [*_compiler()] if target is None else [*python_module_command("ziglang", "cc"), "-target", TARGETS[target]]
    )
    libraries = ["-lm", "-lshell32"] if target == "windows-x86_64" else ["-lm"]
    command += [*_FLAGS, "-s", "-o", program.name, *_UNITS, *libraries]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = (said.decode(errors="replace").strip() or str(error)).splitlines()[0]
        raise ModelError(f"{command[0]} did not compile the program: {reason}; --to c writes its source") from None
    return program


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "").strip() or "cc")
