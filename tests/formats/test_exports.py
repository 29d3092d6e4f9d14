"""Exports that fail: nothing half-written keeps the name, and the message names the file and the cause."""

import errno
import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import gemmule.formats.folder as folder_module
from gemmule.errors import ModelError, OutputError
from gemmule.files import reason_of
from gemmule.formats import exports, program
from gemmule.formats.exports import EXPORTS, Export, export_model, reopen
from gemmule.formats.model_card import ModelCard
from gemmule.formats.opening import open_model
from gemmule.model.finite import nonfinite_weights
from gemmule.processes import python_module_command
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

library = pytest.importorskip("gguf", reason="the gguf library is not installed")

MODEL = lively_model(tiny_config(vocab_size=380, hidden_size=32, intermediate_size=64))
CAUSES = (errno.EIO, errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG)
# Every call that writes, by where it is looked up.
CALLS: list[tuple[Any, str]] = [
    (os, "open"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "replace"),
    (os, "chmod"),
    (io, "open"),
    (folder_module, "save_file"),
    *((library.GGUFWriter, f"write_{part}") for part in ("header_to_file", "kv_data_to_file", "ti_data_to_file")),
    (library.GGUFWriter, "write_tensor_data"),
]


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the C compiler, whose errors are no errors of the system; test_program.py has it."""

    def compile_program(folder: Path, _: object = None) -> Path:
        return folder / "story.c"

    monkeypatch.setattr(program, "check_compiler", lambda _: None)
    monkeypatch.setattr(exports, "check_compiler", lambda _: None)
    monkeypatch.setattr(program, "compile_program", compile_program)


def export_of(tokenizer: Tokenizer, dtype: str = "f32") -> Export:
    return Export(MODEL, tokenizer, dtype, ModelCard("A Name", "gemma"))


class Failing:
    """Counts the calls of a function, and lets one of them fail with an error of the operating system."""

    def __init__(self, owner: Any, name: str, place: int | None = None, cause: int = 0) -> None:
        self.owner, self.name, self.place, self.cause = owner, name, place, cause
        self.count = 0

    def __enter__(self) -> "Failing":
        self.real = getattr(self.owner, self.name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self.name == "open" and not self._writes(*arguments, **options):
                return self.real(*arguments, **options)
            number, self.count = self.count, self.count + 1
            if number == self.place:
                if self.name == "save_file":
                    raise SafetensorError(f"I/O error: {os.strerror(self.cause)} (os error {self.cause})")
                raise OSError(self.cause, os.strerror(self.cause))
            return self.real(*arguments, **options)

        setattr(self.owner, self.name, call)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.real)

    def _writes(self, file: object, mode: Any = "r", *_: object, **options: Any) -> bool:
        if self.owner is os:
            return True  # also for reading: folders are synced by it
        return not set(str(options.get("mode", mode))).isdisjoint("wax+")


def faults_of(
    tokenizer: Tokenizer, to: str, folder: Path, calls: list[tuple[Any, str]], most: int
) -> tuple[int, list[str]]:
    """Let calls fail, up to so many times each one; return how many did, and what was wrong after any."""
    cases, faults = 0, []
    for number, (owner, name) in enumerate(calls):
        with Failing(owner, name) as counted:
            export_model(export_of(tokenizer), to, folder / f"{number}-counted")
        for place in range(min(most, counted.count)):
            out = folder / f"{number}-{place}" / "out"
            out.parent.mkdir()
            cause = CAUSES[cases % len(CAUSES)]
            cases += 1
            if fault := what_is_wrong(tokenizer, to, out, Failing(owner, name, place, cause)):
                faults.append(f"{name} {place}: {fault}")
    return cases, faults


@pytest.mark.parametrize("to", EXPORTS)
def test_an_error_of_the_system_leaves_nothing_or_all(tiny_tokenizer: Tokenizer, tmp_path: Path, to: str) -> None:
    cases, faults = faults_of(tiny_tokenizer, to, tmp_path, [(io, "open"), (os, "fsync"), *CALLS[-5:]], 1)
    assert faults == []
    assert cases >= 2


@pytest.mark.slow
@pytest.mark.parametrize("to", EXPORTS)
def test_any_error_of_the_system_leaves_nothing_or_all(tiny_tokenizer: Tokenizer, tmp_path: Path, to: str) -> None:
    cases, faults = faults_of(tiny_tokenizer, to, tmp_path, CALLS, 1000)
    assert faults == []
    assert cases >= {"hf": 30, "gguf": 100, "ollama": 100, "c": 30, "program": 20, "html": 10, "web": 20}[to]


def what_is_wrong(tokenizer: Tokenizer, to: str, out: Path, failing: Failing) -> str | None:
    """Say what an export that met an error did wrong."""
    try:
        with failing:
            export_model(export_of(tokenizer), to, out)
    except OutputError as error:
        if not str(error).startswith((f"{out}", f"{out.parent}/.out")):
            return f"names no file: {error}"
        if reason_of(OSError(failing.cause, os.strerror(failing.cause))) not in str(error):
            return f"names no cause: {error}"
    else:
        if not out.exists():
            return "an error was passed over"
    if left := [path.name for path in out.parent.iterdir() if path != out and (path.is_file() or any(path.iterdir()))]:
        return f"left {left}"
    if not out.exists():
        export_model(export_of(tokenizer), to, out)  # and the next one is not in its way
    reopen(out / "model.gguf" if to == "ollama" else out, tokenizer)
    return None


def test_a_limit_of_file_sizes_is_told(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        for to in EXPORTS:
            with pytest.raises(OutputError, match=r"cannot be written: larger than the file system, or .*ulimit -f"):
                export_model(export_of(tiny_tokenizer), to, tmp_path / "out")
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def spoiled(tensor: torch.Tensor, value: float) -> Iterator[None]:
    """Set one element of a tensor."""
    flat = tensor.detach().view(-1)
    place = len(flat) // 2
    kept = flat[place].item()
    flat[place] = value
    try:
        yield
    finally:
        flat[place] = kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_weight_that_is_no_number_is_exported(tiny_tokenizer: Tokenizer, tmp_path: Path, value: float) -> None:
    for name, tensor in MODEL.state_dict().items():
        with spoiled(tensor, value):
            assert nonfinite_weights(MODEL) == [name]
    assert nonfinite_weights(MODEL) == []
    for to in EXPORTS:
        with (
            spoiled(tensor, value),
            pytest.raises(ModelError, match=f"{name} holds NaN or infinity"),
        ):
            export_model(export_of(tiny_tokenizer), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8_0", "q5_0", "q4_0", "q5_1", "q4_1"])
def test_no_weight_becomes_infinite_in_an_export(tiny_tokenizer: Tokenizer, tmp_path: Path, dtype: str) -> None:
    weight, limit = MODEL.blocks[2].mlp.down.weight, exports._LARGEST.get(dtype, 65504.0)
    with (
        spoiled(weight, min(limit * 1.01, 3.4e38)),
        pytest.raises(ModelError, match=f"--dtype {dtype}: blocks.2.mlp.down"),
    ):
        export_model(export_of(tiny_tokenizer, dtype), "gguf", tmp_path / "out")
    with spoiled(weight, -limit * 0.99):
        export_model(export_of(tiny_tokenizer, dtype), "gguf", tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in open_model(tmp_path / "out")[0].state_dict().values())


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path, str], None]:
    """Stand in for llama.cpp, which copies the file."""

    def quantize(source: Path, target: Path, _kind: str) -> None:
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(exports, "check_quantizer", lambda _: None)
    monkeypatch.setattr(exports, "quantize", quantize)
    return quantize


@pytest.mark.usefixtures("quantizer")
def test_k_quants_leave_no_whole_file(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.f32").write_text("of an export that was killed")
    export_model(export_of(tiny_tokenizer, "q4_k_m"), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_model(tmp_path / "out")[0].config.vocab_size == 380

    def fail(*_: object) -> None:
        raise ModelError("llama.cpp could not write it")

    monkeypatch.setattr(exports, "quantize", fail)
    with pytest.raises(ModelError, match="could not write it"):
        export_model(export_of(tiny_tokenizer, "q4_k_m"), "gguf", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SLOW_EXPORT = """
import sys, time
from gemmule.formats import exports, program
exports.check_quantizer = lambda _: None
def quantize(*_):
    print("quantizing", flush=True)
    time.sleep(60)
exports.quantize = quantize
from gemmule.cli.main import main
main()
"""


@pytest.mark.slow
def test_sigterm_takes_temporary_files_away(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    folder_module.save_folder(MODEL, tiny_tokenizer, source)
    command = [*python_module_command("x")[:2], "-c", SLOW_EXPORT, "export", str(source), "--to", "gguf"]
    command += ["--out", str(target / "out.gguf"), "--dtype", "q4_k_m"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "quantizing\n"
    assert len(list(target.iterdir())) == 2, "the whole file, and the one that is made"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert (process.returncode, told.splitlines()[-1]) == (143, "gemmule: stopped")
    assert list(target.iterdir()) == []
