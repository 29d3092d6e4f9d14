"""Certificates of pages: what is in the artefact is run, step.wasm by wasmtime and runtime.js by node."""

import copy
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmule.errors import MissingExtra
from gemmule.evaluate.certificate import (
    STRINGS,
    CertificateError,
    difficult_strings,
    file_digests,
    probe_tokens,
    versions,
)
from gemmule.evaluate.wasm import WasmModel
from gemmule.formats.packed import load_packed
from gemmule.formats.page import PageContents, read_page, write_certificate_text
from gemmule.inference.engine import encode_prompt, generate, stop_tokens
from gemmule.inference.quantize import quantize
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

# The largest difference of logits to the rounded model in fp32: int8 rounds activations too, to 16 bits.
MOST_DIFFERENCE = {"f32": 1e-4, "bf16": 1e-4, "int8": 2e-3}
TOKENS = 256
PROMPT = "Once upon a time"
NOT_COMPARED = "not compared: node is not installed"
_TIMEOUT = 3600  # seconds


def check_wasmtime() -> None:
    """Raise MissingExtra where wasmtime is not installed."""
    if find_spec("wasmtime") is None:
        raise MissingExtra("wasmtime", "verify", "verifying a page")


def certify_page(artefact: Path, dtype: str, exported: tuple[Gemma3, Tokenizer]) -> dict[str, Any]:
    """Run what a page holds, compare it with the exported model, and show the result in the page.

    Compared are logits, the greedy continuation of a prompt with that of `gemmule generate`, and, where node is
    installed, the ids of strings. Returns the certificate; MissingExtra without wasmtime.
    """
    check_wasmtime()
    write_certificate_text(artefact, None)
    held, (model, tokenizer) = read_page(artefact), exported
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        packed.write_bytes(held.packed)
        rounded = load_packed(packed).model
        ids = probe_tokens(rounded, tokenizer)
        expected = _greedy(model, rounded, tokenizer, dtype)
        prompt = encode_prompt(rounded, tokenizer, PROMPT)
        wasm = WasmModel(held.wasm, held.packed, max(len(ids), len(prompt) + TOKENS))
        theirs = wasm.logits(ids)
        drawn = wasm.continue_greedily(prompt, len(expected), [*stop_tokens(tokenizer)])
        strings = difficult_strings(STRINGS)
        answer = _ask_node(held, Path(folder), strings)
    with torch.inference_mode():
        ours = rounded(torch.tensor([ids], dtype=torch.long))[0].float().numpy()
    if not np.isfinite(theirs).all() or not np.isfinite(ours).all():
        raise CertificateError(f"{artefact}: the logits of the page are NaN or infinite")
    difference, agreement = float(np.abs(ours - theirs).max()), float((ours.argmax(1) == theirs.argmax(1)).mean())
    same = None if answer is None else _agreeing(tokenizer, strings, answer["encoded"])
    texts = {"wasmtime": drawn == expected} | ({} if answer is None else {"node": answer["ids"] == expected})
    certificate = {
        "passed": difference <= MOST_DIFFERENCE[dtype]
        and agreement == 1
        and same in (None, len(strings))
        and all(texts.values()),
        "artefact": artefact.name,
        "dtype": dtype,
        "runtime": {"name": "wasmtime", "version": version("wasmtime")},
        "positions": len(ids),
        "window": rounded.config.sliding_window,
        "argmax_agreement": agreement,
        "largest_logit_difference": difference,
        "logit_difference_allowed": MOST_DIFFERENCE[dtype],
        "logit_standard_deviation": float(ours.std()),
        "greedy_tokens": len(expected),
        "greedy_text_equals_generate": texts,
        "tokenizer_agreement": NOT_COMPARED if same is None else f"{same} of {len(strings)} strings",
        "tokenizer_runtime": None if answer is None else {"name": "node", "version": answer["version"]},
        "versions": versions(),
    }
    write_certificate_text(artefact, describe_page(certificate))
    return certificate | {"sha256": file_digests(artefact)}


def describe_page(certificate: dict[str, Any]) -> str:
    """Summarize a page's certificate in two lines."""
    runtime, texts = certificate["runtime"], certificate["greedy_text_equals_generate"]
    differing = [name for name, same in texts.items() if not same]
    continuation = f"different in {' and '.join(differing)}" if differing else f"the same in {' and '.join(texts)}"
    return (
        f"{runtime['name']} {runtime['version']} over {certificate['positions']} positions, the window being "
        f"{certificate['window']}: the same likeliest token at {certificate['argmax_agreement']:.2%}, logits within "
        f"{certificate['largest_logit_difference']:.1e} (their standard deviation is "
        f"{certificate['logit_standard_deviation']:.2f})\n"
        f"greedy text of {certificate['greedy_tokens']} tokens: {continuation}; the same tokens for strings: "
        f"{certificate['tokenizer_agreement']}: {'passed' if certificate['passed'] else 'FAILED'}"
    )


def _greedy(model: Gemma3, rounded: Gemma3, tokenizer: Tokenizer, dtype: str) -> list[int]:
    """Return the tokens of `gemmule generate --temperature 0`, with --int8 for int8."""
    network = quantize(copy.deepcopy(model)) if dtype == "int8" else rounded
    events = generate(network, tokenizer, PROMPT, max_new_tokens=TOKENS, temperature=0)
    return [event.token for event in events]


def _agreeing(tokenizer: Tokenizer, strings: Sequence[str], encoded: Sequence[Sequence[int]]) -> int:
    return sum(tokenizer.encode(text) == given for text, given in zip(strings, encoded, strict=True))


def _ask_node(held: PageContents, folder: Path, strings: list[str]) -> dict[str, Any] | None:
    """Return what the page's own runtime answers in node; None where that is not installed."""
    node = shutil.which("node")
    if node is None:
        return None
    job: dict[str, Any] = {"strings": strings, "prompt": PROMPT, "tokens": TOKENS, "packed": str(folder / "packed")}
    for name, content in (("runtime", held.runtime.encode()), ("wasm", held.wasm)):
        (folder / name).write_bytes(content)
        job[name] = str(folder / name)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [node, str(Path(__file__).with_name("page_check.js")), str(folder / "job.json")]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT)
    if ended.returncode:
        lines = [line for line in ended.stderr.strip().splitlines() if "Error" in line] or ["no message"]
        raise CertificateError(f"node cannot run the runtime of the page (exit code {ended.returncode}): {lines[0]}")
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer
