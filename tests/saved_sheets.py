"""The file of `gemmule chat` and of the server's page, as tests read it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemmule.inference.conversation import Piece
from gemmule.inference.sheets import read_sheet, read_sheets


def read_sheet_of(file: Path) -> Any:
    """Return the only sheet of a file, as JSON."""
    (sheet,) = json.loads(file.read_text(encoding="utf-8"))["sheets"]
    return sheet


def read_pieces(file: Path) -> list[Piece]:
    """Return the pieces of the only sheet of a file, without ids of nodes."""
    (sheet,) = read_sheets(file)
    return [replace(piece, node=None) for piece in read_sheet(sheet).conversation.pieces]
