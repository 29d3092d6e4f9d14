"""Run another runtime in its own process: python -m gemmule.evaluate.foreign JOB.

JOB is a JSON file: runtime, path, ids, strings and out. Written are `out`.npy, the logits (T, V) after each of the ids,
and `out`.json, the ids of each string and the runtime's version.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmule.evaluate.page_runtime import run_page
from gemmule.formats.program import PACKED, compile_program

# Logits, the ids of each string (None where the runtime cannot say), the runtime's version.
Answer = tuple[npt.NDArray[np.float32], list[list[int]] | None, str]


def run_transformers(path: str, ids: list[int], strings: list[str]) -> Answer:
    """Open a model folder with transformers, in fp32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], dtype=torch.long)).logits[0].float().numpy()
    return logits, [tokenizer.encode(text, split_special_tokens=True) for text in strings], transformers.__version__


def run_llama_cpp(path: str, ids: list[int], strings: list[str]) -> Answer:
    """Open a GGUF file with llama.cpp; keys and values are kept in fp32, so that they do not add to the difference."""
    import llama_cpp

    library = llama_cpp.llama_cpp
    usual = library.llama_model_default_params

    def plain_kernels() -> Any:
        # Weights rearranged for AMX crash llama.cpp on some virtual machines; the plain layout runs everywhere.
        parameters = usual()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_model_default_params = plain_kernels
    llama = llama_cpp.Llama(
        path, n_ctx=len(ids) + 1, n_batch=512, logits_all=True, type_k=0, type_v=0, verbose=False, n_gpu_layers=0
    )
    llama.eval(ids)
    encoded = [llama.tokenize(text.encode(), add_bos=True, special=False) for text in strings]
    return np.asarray(llama.scores[: len(ids)], dtype=np.float32), encoded, version("llama-cpp-python")


def run_program(path: str, ids: list[int], strings: list[str]) -> Answer:
    """Run a C program, compiled where its source is given."""
    with open_program(Path(path)) as command:
        logits = np.frombuffer(_output(command, "--logits", given=" ".join(map(str, ids)).encode()), "<f4")
        texts = b"".join(text.encode() + b"\0" for text in strings)
        lines = _output(command, "--encode", given=texts).decode().splitlines()
        return logits.reshape(len(ids), -1), [[*map(int, line.split())] for line in lines], version("gemmule")


def greedy_ids(artefact: Path, prompt: str, count: int) -> list[int]:
    """Return the ids that a C program continues a prompt with, the likeliest each time."""
    with open_program(artefact) as command:
        options = ("--ids", "--temperature", "0", "--tokens", str(count), "--prompt", prompt)
        return [*map(int, _output(command, *options).split())]


@contextmanager
def open_program(artefact: Path) -> Iterator[list[str]]:
    """Yield the command that runs an exported program; of a folder with its source it is compiled."""
    if artefact.is_file():
        yield [str(artefact.absolute())]
        return
    with tempfile.TemporaryDirectory() as private:
        folder = Path(shutil.copytree(artefact, Path(private) / "source"))
        yield [str(compile_program(folder)), str(artefact / PACKED)]


def _output(command: list[str], *options: str, given: bytes = b"") -> bytes:
    ended = subprocess.run([*command, *options], input=given, capture_output=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr.decode(errors="replace").strip() or f"exit code {ended.returncode}")
    return ended.stdout


RUNTIMES = {
    "transformers": run_transformers,
    "llama.cpp": run_llama_cpp,
    "program": run_program,
    "wasmtime": run_page,
}


def main() -> None:
    """Do the job that the first argument names."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logits, encoded, release = RUNTIMES[job["runtime"]](job["path"], job["ids"], job["strings"])
    np.save(job["out"] + ".npy", logits)
    Path(job["out"] + ".json").write_text(json.dumps({"encoded": encoded, "version": release}), encoding="utf-8")


if __name__ == "__main__":
    main()
