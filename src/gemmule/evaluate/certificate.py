"""Certificates of exports: logits and token ids of another runtime, compared with ours."""

import copy
import hashlib
import json
import platform
import random
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gemmule.errors import GemmuleError, MissingExtra
from gemmule.evaluate.foreign import greedy_ids
from gemmule.evaluate.page_runtime import greedy_texts
from gemmule.files import atomic_write
from gemmule.formats.page import write_certificate_text
from gemmule.inference.engine import encode_prompt, reply_to_all, stop_tokens
from gemmule.inference.quantize import quantize
from gemmule.inference.requests import Request
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3, last_logits
from gemmule.processes import python_module_command
from gemmule.storybook import stories
from gemmule.tokenizer import Tokenizer

STRINGS = 1000
_ODD = ["  ", "   ", "\n", "\n\n", "\t", "\t\t", " \n", "\r\n", "\u200b", "Ünïcödé", "日本語", "Привет", "مرحبا"]
_ODD += ["e\u0301", "\ua66e", "\U0001f984", "<b>", "</table>", "...", "-" * 40, "1234567", "3.14", "don't"]
_ODD += ["def f(x):\n    return x", "<end_of_turn>", "http://a.b/c?d=e"]
_LIBRARIES = {
    "transformers": ("transformers", "parity"),
    "llama.cpp": ("llama_cpp", "llama"),
    "wasmtime": ("wasmtime", "verify"),
}
_PACKAGES = {"llama_cpp": "llama-cpp-python"}
# Largest root mean square difference of logits, as a share of their standard deviation: llama.cpp rounds activations to
# the type of the weights, where we compute in fp32.
MOST_ROUNDING = {"f32": 0.002, "int8": 0.002, "f16": 0.005, "bf16": 0.02, "q8_0": 0.05}
MOST_ROUNDING_BELOW = 0.1  # of fewer bits
# The least share of positions at which both hold the same token for the likeliest. Where we hold the two tokens for
# as likely as rounding can tell, that is within so many root mean squares, either is right.
LEAST_ARGMAX = 0.995
_TIE = 4
_PROMPT, _GREEDY = "Once upon a time", 256  # the greedy text of a program or a page
NOT_COMPARED = "nothing, because node is not installed"
_MOST_LOGITS = 3 * 2**26  # held at once by each side, 0.8 GB: 768 positions of Google's vocabulary, whose window is 512


class CertificateError(GemmuleError):
    """An export computes something else in another runtime, or does not open there."""


def check_runtime(runtime: str) -> None:
    """Raise MissingExtra where the library that runs exports is not installed; a program needs none."""
    if runtime == "program":
        return
    library, extra = _LIBRARIES[runtime]
    if find_spec(library) is None:
        raise MissingExtra(_PACKAGES.get(library, library), extra, f"verifying with {runtime}")


def certify(
    artefact: Path, runtime: str, dtype: str, exported: tuple[Gemma3, Tokenizer], reopened: tuple[Gemma3, Tokenizer]
) -> dict[str, Any]:
    """Compare an artefact in another runtime with what we read from it ourselves, and with what was exported.

    A page then shows it. Returns the certificate; raises MissingExtra without the runtime, CertificateError where that
    cannot open it.
    """
    check_runtime(runtime)
    model, tokenizer = reopened
    ids, strings = _tokens(model, tokenizer), difficult_strings(STRINGS)
    answer, theirs = _ask(runtime, artefact, ids, strings)
    with torch.inference_mode():
        ours = model(torch.tensor([ids], dtype=torch.long))[0].float().numpy()
        original = exported[0](torch.tensor([ids], dtype=torch.long))[0].float().numpy()[:, : ours.shape[1]]
    if not np.isfinite(theirs).all() or not np.isfinite(ours).all():
        whose = runtime if np.isfinite(ours).all() else "Gemmule"
        raise CertificateError(f"{artefact}: {whose} computes logits from it that are NaN or infinite")
    encoded = answer["encoded"]
    same = (
        None
        if encoded is None
        else sum(
            tokenizer.encode(text) == given and exported[1].encode(text) == given
            for text, given in zip(strings, encoded, strict=True)
        )
    )
    rms = float(np.sqrt(np.square(ours - theirs).mean()))
    margin = ours.max(1) - np.take_along_axis(ours, theirs.argmax(1)[:, None], 1)[:, 0]
    agreement = float((margin <= _TIE * rms).mean())
    share, most = rms / float(ours.std()), MOST_ROUNDING.get(dtype, MOST_ROUNDING_BELOW)
    passed = agreement >= LEAST_ARGMAX and share <= most and same in (None, len(strings))
    greedy = _compare_greedy(artefact, runtime, dtype, exported, model, _TIE * rms)
    certificate: dict[str, Any] = {
        "passed": passed and (greedy is None or greedy.equal),
        "artefact": artefact.name,
        "dtype": dtype,
        "runtime": {"name": runtime, "version": answer["version"]},
        "positions": len(ids),
        "window": model.config.sliding_window,
        "argmax_agreement": float((margin == 0).mean()),
        "argmax_agreement_beyond_rounding": agreement,
        "argmax_agreement_required": LEAST_ARGMAX,
        "logit_difference_rms": rms,
        "logit_difference_rms_over_standard_deviation": share,
        "logit_difference_allowed": most,
        "largest_logit_difference": _largest(ours, theirs),
        "logit_standard_deviation": float(ours.std()),
        "largest_logit_difference_to_the_exported_model": _largest(original, theirs),
        "tokenizer_agreement": NOT_COMPARED if same is None else f"{same} of {len(strings)} strings",
        **({} if greedy is None else {"greedy_agreement": greedy.sentence}),
        "versions": {name: version(name) for name in ("gemmule", "torch", "tokenizers", "safetensors")}
        | {"python": platform.python_version()},
    }
    if runtime == "wasmtime":
        write_certificate_text(artefact, describe(certificate))
    return certificate | {"sha256": {name: _sha256(file) for name, file in _files(artefact)}}


class _Greedy(NamedTuple):
    equal: bool
    sentence: str


def _compare_greedy(
    artefact: Path, runtime: str, dtype: str, exported: tuple[Gemma3, Tokenizer], reopened: Gemma3, rounding: float
) -> _Greedy | None:
    """Compare the greedy text of a program or page with that of our engine, with int8 weights where it has them."""
    if runtime not in ("program", "wasmtime"):
        return None
    model, tokenizer = (quantize(copy.deepcopy(exported[0])) if dtype == "int8" else reopened), exported[1]
    prompt, stops = encode_prompt(model, tokenizer, _PROMPT), stop_tokens(tokenizer)
    count = min(_GREEDY, model.config.max_position_embeddings - len(prompt))
    request = Request(tuple(prompt), count, SamplingSettings(temperature=0), 0, stops=stops)
    ours = reply_to_all(model, [request])[0]
    if runtime == "program":
        return _same_tokens(prompt, ours, greedy_ids(artefact, _PROMPT, count), reopened, rounding)
    texts = greedy_texts(artefact, prompt, count, [*stops])
    compared = {name: _same_tokens(prompt, ours, ids, reopened, rounding) for name, ids in texts.items()}
    sentence = ", ".join(f"{greedy.sentence} in {name}" for name, greedy in compared.items())
    return _Greedy(all(greedy.equal for greedy in compared.values()), sentence)


def _same_tokens(prompt: list[int], ours: list[int], theirs: list[int], model: Gemma3, rounding: float) -> _Greedy:
    """Compare two continuations of a prompt.

    Where they part, they are equal if the model's logits of the two tokens are within rounding of each other.
    """
    same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    if same == len(ours) == len(theirs):
        return _Greedy(True, f"{same} of {same} tokens")
    if same == min(len(ours), len(theirs)):
        return _Greedy(False, f"{same} of {len(ours)} tokens, where one of them ends")
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ours[:same]], dtype=torch.long), output_head=last_logits)[0, -1]
    tied = float((logits[ours[same]] - logits[theirs[same]]).abs()) <= rounding
    return _Greedy(tied, f"{same} of {len(ours)} tokens{', where two are equally likely' if tied else ''}")


def write_certificate(certificate: dict[str, Any], path: Path) -> None:
    """Write certificate.json."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(certificate, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe(certificate: dict[str, Any]) -> str:
    """Summarize a certificate in two lines."""
    runtime = certificate["runtime"]
    return (
        f"{runtime['name']} {runtime['version']} over {certificate['positions']} positions, the window being "
        f"{certificate['window']}: the same likeliest token at {certificate['argmax_agreement']:.2%} "
        f"({certificate['argmax_agreement_beyond_rounding']:.2%} but for ties), logits within "
        f"{certificate['largest_logit_difference']:.1e} (their standard deviation is "
        f"{certificate['logit_standard_deviation']:.2f})\n"
        f"the same tokens for {certificate['tokenizer_agreement']}"
        + (f", greedy text the same for {certificate['greedy_agreement']}" if "greedy_agreement" in certificate else "")
        + f": {'passed' if certificate['passed'] else 'FAILED'}"
    )


def difficult_strings(count: int) -> list[str]:
    """Return strings that tokenizers are likely to disagree about, the same ones each time.

    U+2581 is left out: SentencePiece, and so llama.cpp, cannot tell it from a space.
    """
    draw = random.Random(0)
    words = " ".join(story.text for story in stories(20, seed=3)).split(" ")
    return ["".join(_piece(draw, words) for _ in range(1 + number % 12)) for number in range(count)]


def _piece(draw: random.Random, words: list[str]) -> str:
    return draw.choice((" ", "")) + draw.choice(words if draw.random() < 0.7 else _ODD)


def _tokens(model: Gemma3, tokenizer: Tokenizer) -> list[int]:
    """Encode stories up to beyond twice the window, as far as the model and the memory for logits reach."""
    longest = min(model.config.max_position_embeddings, _MOST_LOGITS // model.config.vocab_size)
    text = "\n".join(story.text for story in stories(40, seed=4))
    return tokenizer.encode(text)[: min(longest, max(256, 2 * model.config.sliding_window + 32))]


def _ask(runtime: str, artefact: Path, ids: list[int], strings: list[str]) -> tuple[dict[str, Any], Any]:
    """Return the results of another runtime: encoded strings and version, and logits (T, V)."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "answer"
        question = {"runtime": runtime, "path": str(artefact), "ids": ids, "strings": strings, "out": str(out)}
        job.write_text(json.dumps(question), encoding="utf-8")
        command = python_module_command("gemmule.evaluate.foreign", str(job))
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise CertificateError(
                f"{artefact}: {runtime} cannot open or run it (exit code {ended.returncode}): {last}"
            )
        answer: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return answer, np.load(out.with_suffix(".npy"), allow_pickle=False)


def _largest(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


def _files(artefact: Path) -> list[tuple[str, Path]]:
    files = sorted(artefact.iterdir()) if artefact.is_dir() else [artefact]
    return [(file.name, file) for file in files if file.name != "certificate.json"]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
