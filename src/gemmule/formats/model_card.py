"""Model cards: README.md with front matter, as on the Hub, or the same fields from GGUF metadata."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import ModelError
from gemmule.files import atomic_write
from gemmule.formats.gguf_file import GgufHeader
from gemmule.reading import path_kind

CARD = "README.md"
_LARGEST = 1 << 16  # bytes of a card that are read; the front matter comes first
_SEAL = "<!-- gemmule report, sha256 of the rest: {} -->\n"


class ModelCard(NamedTuple):
    """Name and license of a model; None where unknown."""

    name: str | None = None
    license: str | None = None


NO_CARD = ModelCard()


class CardResult(NamedTuple):
    """A figure of an evaluation, with its 95 % interval where one is known."""

    dataset: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def read_card(source: Path) -> ModelCard:
    """Return the card of a model folder or a GGUF file; ModelError where that cannot be read."""
    if path_kind(source, ModelError) != "folder":
        metadata = GgufHeader(source).metadata
        return ModelCard(*(_line(metadata.get(f"general.{key}")) for key in ("name", "license")))
    file = source / CARD
    if path_kind(file, ModelError) != "file":
        return NO_CARD
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    entries = dict(re.findall(r"^(\w+):[ \t]*[\"']?([^\"'\r\n]+)", front[1], re.MULTILINE)) if front else {}
    return ModelCard(_line(entries.get("model_name")), _line(entries.get("license_name") or entries.get("license")))


def write_card(card: ModelCard, folder: Path) -> None:
    """Write README.md with the known fields of a card; nothing where there are none."""
    entries = {"license": card.license, "model_name": card.name}
    lines = [f"{key}: {value}" for key, value in entries.items() if value is not None]
    if lines:
        (folder / CARD).write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")


def hub_card(
    name: str,
    text: str,
    *,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[CardResult] = (),
) -> str:
    """Return a Hub model card: front matter with the results in the Hub's model-index, then a text in Markdown.

    `datasets` are names on the Hub. The license of the model is not said: that is for its owner to choose.
    """
    entries: dict[str, Any] = {
        "model_name": name,
        "base_model": base_model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma3_text", "gemmule"],
        "datasets": list(datasets) or None,
        "model-index": [{"name": name, "results": [_result(each) for each in results]}] if results else None,
    }
    # Values of JSON are values of YAML, and no text can end them.
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value is not None]
    return "\n".join(["---", *lines, "---", "", text])


def write_hub_card(card: str, folder: Path) -> bool:
    """Write README.md of a model folder; False where there is one that somebody else wrote or changed."""
    file, seal = folder / CARD, re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})")
    if path_kind(file):
        old = file.read_text(encoding="utf-8", errors="replace")
        ours = re.search(f"{seal}$", old)
        if ours is None or ours[1] != _sha256(old[: ours.start()]):
            return False
    with atomic_write(file) as temporary:
        temporary.write_text(card + _SEAL.format(_sha256(card)), encoding="utf-8")
    return True


def license_note(card: ModelCard, source: str) -> str | None:
    """Return a note on the license of a model's weights, or None where it is unknown."""
    return None if card.license is None else f"license of {source}: {card.license}; it also applies to this copy"


def _result(result: CardResult) -> dict[str, Any]:
    metric: dict[str, Any] = {
        "type": result.metric,
        "name": result.metric.replace("_", " "),
        "value": result.value,
    }
    if result.low is not None and result.high is not None:
        metric["args"] = {"interval_95": [result.low, result.high]}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": result.dataset, "type": result.dataset},
        "metrics": [metric],
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _line(value: object) -> str | None:
    """Return a printable string of one line, or None."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text and text.isprintable() and len(text) <= 200 else None
