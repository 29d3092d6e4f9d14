"""Stage cache: a manifest per finished work unit, so that an interrupted preparation resumes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmule.files import atomic_write, remove, sha256, sync

_KEY = "made-from"  # file in a stage's folder with the key of its inputs


def open_stage(folder: Path, key: str) -> bool:
    """Create or reuse the folder of a stage; return False where it was cached for other inputs and is deleted."""
    stored = folder / _KEY
    if stored.is_file() and stored.read_text(encoding="ascii") == key:
        return True
    fresh = not folder.exists()
    remove(folder)  # all of it: a manifest left behind would be taken for valid
    with atomic_write(stored) as temporary:
        temporary.write_text(key, encoding="ascii")
    return fresh


def cache_key(*inputs: object) -> str:
    """Return the cache key of a stage: a SHA-256 of its inputs (anything JSON-serializable)."""
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def commit(manifest: Path, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Mark a work unit as finished by an atomic write of its manifest: the result, and the SHA-256 of each file.

    The files are synced first; they are in the folder of the manifest or below it.
    """
    digests = {}
    for file in files:
        sync(file)
        digests[str(file.relative_to(manifest.parent))] = sha256(file)
    with atomic_write(manifest) as temporary:
        temporary.write_text(json.dumps({"result": result, "files": digests}), encoding="utf-8")


def committed(manifest: Path) -> dict[str, Any] | None:
    """Return the result of a finished work unit; None without a valid manifest, or where a file does not match it."""
    try:
        record = json.loads(manifest.read_bytes())
        intact = all(sha256(manifest.parent / name) == digest for name, digest in record["files"].items())
    except (FileNotFoundError, ValueError):
        return None
    return record["result"] if intact else None
