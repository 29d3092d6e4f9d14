"""A page run without a browser: what it holds, step.wasm by wasmtime and runtime.js by node."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmule.evaluate.wasm import WasmModel
from gemmule.formats.page import PageContents, read_page

_TIMEOUT = 3600  # seconds


def run_page(path: str, ids: list[int], strings: list[str]) -> tuple[npt.NDArray[np.float32], Any, str]:
    """Return logits (T, V), the ids of each string, None without node, and wasmtime's version."""
    held = read_page(Path(path))
    with closing(WasmModel(held.wasm, held.packed, len(ids))) as model:
        logits = model.logits(ids)
    answer = _ask_node(held, {"strings": strings})
    return logits, answer and answer["encoded"], version("wasmtime")


def greedy_texts(artefact: Path, prompt: Sequence[int], count: int, stops: Sequence[int]) -> dict[str, list[int]]:
    """Return the likeliest continuation of a prompt, by wasmtime, and where node is installed by node."""
    held = read_page(artefact)
    with closing(WasmModel(held.wasm, held.packed, len(prompt) + count)) as model:
        texts = {"wasmtime": model.continue_greedily(prompt, count, stops)}
    answer = _ask_node(held, {"prompt": [*prompt], "tokens": count})
    return texts if answer is None else texts | {"node": answer["ids"]}


def _ask_node(held: PageContents, question: dict[str, Any]) -> dict[str, Any] | None:
    """Return what page_check.js answers; None where node is not installed."""
    node = shutil.which("node")
    if node is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        for name, content in (("runtime", held.runtime.encode()), ("wasm", held.wasm), ("packed", held.packed)):
            (Path(folder) / name).write_bytes(content)
            question[name] = str(Path(folder) / name)
        job.write_text(json.dumps(question), encoding="utf-8")
        command = [node, str(Path(__file__).with_name("page_check.js")), str(job)]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if "Error" in line] or ["no message"]
        raise RuntimeError(f"node, exit code {ended.returncode}: {errors[0]}")
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer
