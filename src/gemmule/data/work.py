"""The work folder of a preparation: what is finished of it, so that one that was killed goes on."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmule.files import sha256, sync, written_aside

_KEY = "made-from"  # the file in a stage's folder that says what it is made from


def claim_stage(folder: Path, key: str) -> bool:
    """Make the folder of a stage ready; return False where it held what was made from something else, now gone."""
    stored = folder / _KEY
    if stored.is_file() and stored.read_text(encoding="ascii") == key:
        return True
    fresh = not folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    with written_aside(stored) as aside:
        aside.write_text(key, encoding="ascii")
    return fresh


def key_of(*parts: object) -> str:
    """Return a key for a stage that is made from these parts (anything that JSON can write)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def finish(note: Path, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write down a unit's result; from now on it is finished, with the files that lie beside or below the note."""
    digests = {}
    for file in files:
        sync(file)
        digests[str(file.relative_to(note.parent))] = sha256(file)
    with written_aside(note) as aside:
        aside.write_text(json.dumps({"result": result, "files": digests}), encoding="utf-8")


def finished(note: Path) -> dict[str, Any] | None:
    """Return the result that was written down, or None where there is none or one of its files is not whole."""
    try:
        record = json.loads(note.read_bytes())
        whole = all(sha256(note.parent / name) == digest for name, digest in record["files"].items())
    except (FileNotFoundError, ValueError):
        return None
    return record["result"] if whole else None
