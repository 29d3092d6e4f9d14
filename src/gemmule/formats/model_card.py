"""Model cards: name and license from README.md's front matter, as on the Hub, or from GGUF metadata."""

import re
from pathlib import Path
from typing import NamedTuple

from gemmule.errors import ModelError
from gemmule.formats.gguf_file import GgufHeader
from gemmule.reading import path_kind

CARD = "README.md"
_LARGEST = 1 << 16  # bytes of a card that are read; the front matter comes first


class ModelCard(NamedTuple):
    """Name and license of a model; None where unknown."""

    name: str | None = None
    license: str | None = None


NO_CARD = ModelCard()


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


def license_note(card: ModelCard, source: str) -> str | None:
    """Return a note on the license of a model's weights, or None where it is unknown."""
    return None if card.license is None else f"license of {source}: {card.license}; it also applies to this copy"


def _line(value: object) -> str | None:
    """Return a printable string of one line, or None."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text and text.isprintable() and len(text) <= 200 else None
