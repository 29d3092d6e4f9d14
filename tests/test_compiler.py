import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from gemmule import compiler
from gemmule.compiler import damaged_library, rebuilding, remove_truncated_libraries

LIBRARY = Path(importlib.util.find_spec("_ctypes").origin or "")  # type: ignore[union-attr]
needs_elf = pytest.mark.skipif(
    not LIBRARY.is_file() or LIBRARY.read_bytes()[:4] != b"\x7fELF", reason="no ELF library of Python's own is here"
)


def run(program: str, cache: Path | None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    variables.pop("TORCHINDUCTOR_CACHE_DIR", None)
    variables |= {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    (folder / "ab").mkdir(parents=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


def test_gcc_is_asked_not_to_join_scalars_into_vectors() -> None:
    """Its SLP vectorizer miscompiles Inductor's kernels; see the slow test below."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    compiler._patch_inductor()
    options = CppTorchDeviceOptions(device_type="cpu")
    assert " -fno-tree-slp-vectorize " in CppBuilder(name="o", sources="i", BuildOption=options).get_command_line()


def test_library_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "kernel.so"

    def build(command: str, _cwd: str) -> None:
        place = Path(command.split()[-1])
        assert place.parent == tmp_path
        place.write_text("half")
        assert not target.exists()
        if "broken" in command:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiler._run_atomically(build, f"g++ broken.cpp -o {target}", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    compiler._run_atomically(build, f"g++ a.cpp -o {target}", str(tmp_path))
    assert list(tmp_path.iterdir()) == [target]


@needs_elf
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999999])
def test_cut_libraries_are_removed_and_whole_ones_kept(cache: Path, share: float) -> None:
    whole, cut, fresh = cache / "ab" / "whole.so", cache / "ab" / "cut.so", cache / "ab" / "fresh.so"
    for file in (whole, cut, fresh):
        shutil.copy(LIBRARY, file)
    for file in (cut, fresh):
        os.truncate(file, int(share * file.stat().st_size))
    for file in (whole, cut):
        os.utime(file, (0, 0))
    remove_truncated_libraries(cache, 60)
    assert sorted(cache.rglob("*.so")) == sorted([whole, fresh]), "a fresh one may be being written"
    remove_truncated_libraries(cache, 0)
    assert list(cache.rglob("*.so")) == [whole]


def test_what_was_not_used_for_a_month_is_removed(cache: Path) -> None:
    new, old, outside = cache / "ab" / "new.so", cache / "ab" / "old.so", cache.parent / "old.so"
    for file in (new, old, outside):
        file.touch()
    for file in (old, outside):
        os.utime(file, (0, 0))
    (cache / "ab" / "link").symlink_to(outside)
    compiler._remove_unused(cache)
    assert sorted(path.name for path in (cache / "ab").iterdir()) == ["link", "new.so"]
    assert outside.exists()


COMPILE = """
    import torch
    from gemmule.compiler import compile_function, rebuilding

    def function(x):
        return torch.nn.functional.gelu(x @ x.T).softmax(-1).sum()

    x = torch.randn(64, 64, requires_grad=True)
    rebuilding(lambda: compile_function(function)(x).backward())
"""


class Compiled(NamedTuple):
    """A machine's folders after a first compilation, which takes a minute on a slow one."""

    root: Path
    variables: dict[str, str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    root = tmp_path_factory.mktemp("compiled")
    (root / "tmp").mkdir()
    variables = {"XDG_CACHE_HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
    done = run(COMPILE, None, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return Compiled(root, variables)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is here")
def test_compiled_code_lies_in_a_folder_of_this_user(compiled: Compiled) -> None:
    """torch's own place is a name below /tmp that everybody knows, and may have made."""
    made = [path for path in compiled.root.rglob("*") if path.suffix in (".so", ".h", ".gch", ".cpp")]
    assert made
    assert all(path.is_relative_to(compiled.root / "home" / "gemmule" / "inductor") for path in made)
    assert (compiled.root / "home" / "gemmule").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@needs_elf
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is here")
def test_run_goes_on_after_an_interrupt_cut_the_libraries(compiled: Compiled) -> None:
    cache = compiled.root / "home" / "gemmule" / "inductor"
    for pattern, share, age in (("*.main.so", 0, 0), ("*.so", 0, 100), ("*.so", 0.5, 100)):
        cut = list(cache.rglob(pattern))
        assert cut
        for file in cut:
            os.truncate(file, int(share * file.stat().st_size))
            os.utime(file, (file.stat().st_mtime - age,) * 2)
        done = run(COMPILE, None, **compiled.variables)
        assert done.returncode == 0, (pattern, done.stderr[-2000:])
        assert all(compiler._is_whole(file) for file in cache.rglob("*.so")), pattern


def test_damaged_library_is_found_in_the_message_of_the_loader(cache: Path) -> None:
    file = cache / "ab" / "c0.main.so"
    for reason in ("file too short", "invalid ELF header", "cannot read file data: Input/output error"):
        assert damaged_library(ImportError(f"InductorError: ImportError: {file}: {reason}")) == file
    assert damaged_library(ImportError("/elsewhere/c0.main.so: file too short")) is None
    assert damaged_library(ImportError(f"{file}: undefined symbol: f")) is None
    assert damaged_library(ValueError(f"{file}: file too short")) is None


def test_damaged_library_is_built_again_once(messages: list[str], cache: Path) -> None:
    file = cache / "ab" / "c0.so"
    file.touch()

    def load() -> str:
        if file.exists():
            raise ImportError(f"{file}: file too short")
        return "loaded"

    assert rebuilding(load) == "loaded"
    assert messages == [f"{file}: a truncated library in the compiler's cache is removed, and compiled again"]

    def fail() -> None:
        raise ImportError(f"{file}: file too short")

    with pytest.raises(ImportError, match="file too short"):
        rebuilding(fail)


GRADIENTS = """
    import torch
    from gemmule.compiler import compile_block
    from gemmule.model.config import Gemma3Config
    from gemmule.model.gemma3 import Gemma3
    from gemmule.model.init import init_weights
    from gemmule.train.loss import summed_loss

    config = Gemma3Config(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=1, head_dim=64,
                          sliding_window_pattern=1, query_pre_attn_scalar=64)
    for rows in (8, 16):
        model = Gemma3(config, "block-local").train()
        init_weights(model, 0)
        compile_block(model.blocks[0])
        tokens = torch.randint(512, (rows, 257), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens[:, :-1], output_head=summed_loss(tokens[:, 1:])).backward()
        bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
        assert not bad, bad
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is here")
def test_gradients_are_finite_where_gcc_tunes_for_no_processor(tmp_path: Path) -> None:
    """As it does on processors that it does not know, such as a Xeon whose AMX the virtual machine hides."""
    wrapper = tmp_path / "bin" / "g++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -mtune=generic\n')
    wrapper.chmod(0o755)
    done = run(GRADIENTS, tmp_path / "cache", CXX=str(wrapper))
    assert done.returncode == 0, done.stderr[-2000:]
