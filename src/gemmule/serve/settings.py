"""The settings of a server."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

from gemmule.errors import UserError
from gemmule.inference.engine import MAX_ROWS
from gemmule.inference.runners import Decoding
from gemmule.reading import local_path, path_kind
from gemmule.run_folder import RECIPE_FILE

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = frozenset({LOOPBACK, "localhost", "::1"})
_KEY = re.compile(rb"[\x21-\x7e]{8,512}")


class ModelSpec(NamedTuple):
    """A MODEL, and the name by which requests ask for it."""

    id: str
    model: str


@dataclass(frozen=True)
class Limits:
    """Bounds of what one client, or all of them, can make the server do."""

    head_bytes: int = 64 << 10
    body_bytes: int = 8 << 20
    request_seconds: float = 10  # from the first byte to the last one of a request
    idle_seconds: float = 75  # of a connection without a request
    stalled_seconds: float = 60  # of a client that takes nothing of its reply
    connections: int = 512
    queue: int = 256  # sequences that wait, of each model
    choices: int = 128  # prompts times n
    samples: int = 64  # n
    stop_strings: int = 16
    stop_length: int = 1000  # characters
    keep_alive_seconds: float = 10  # until a silent stream gets a comment


@dataclass(frozen=True)
class ServerSettings:
    """All that is set at the start."""

    models: tuple[ModelSpec, ...]
    host: str = LOOPBACK
    port: int = 8000
    api_keys: tuple[bytes, ...] = ()
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    max_rows: int = MAX_ROWS
    context: int | None = None  # positions of the longest sequence; that of the model
    chunk: int | None = None  # prompt tokens per step
    cache_bytes: int | None = None  # of each model
    drain_seconds: float = 30
    device: str = "auto"
    decoding: Decoding = "auto"
    int8: bool = False
    adapters: tuple[str, ...] = ()  # merged into the one model
    chat: bool = False  # whether models without a chat template chat, too
    follow: bool = False
    follow_seconds: float = 2.0  # between two looks for a newer checkpoint
    access_log: bool = True

    def follows(self, spec: ModelSpec) -> bool:
        """Whether newer checkpoints of a MODEL are taken up: with --follow those of run folders are."""
        return self.follow and path_kind(local_path(spec.model) / RECIPE_FILE) == "file"


def name_models(models: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Name each MODEL, or take the name from NAME=MODEL; UserError where two have the same one."""
    specs = tuple(_named(each) for each in models)
    names = [each.id for each in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are named {name!r}; give them names of their own: NAME=MODEL")
    return specs


def _named(given: str) -> ModelSpec:
    name, equals, model = given.partition("=")
    if equals and re.fullmatch(r"[\w.:/-]{1,200}", name):
        if not model:
            raise UserError(f"MODEL {given!r}: nothing stands behind the name")
        return ModelSpec(name, model)
    path = PurePath(given)
    if path.suffix == ".gguf":
        return ModelSpec(path.stem, given)
    parts = [part for part in path.parts if part not in ("/", ".", "..")]
    if len(parts) > 1 and parts[-1] == "model":  # of a run folder
        parts = parts[:-1]
    elif len(parts) > 2 and parts[-2] == "checkpoints":
        parts = [*parts[:-2], f"{parts[-3]}-{parts[-1]}"]
    name = parts[-1] if parts else "model"
    return ModelSpec(re.sub(r"[^\w.:-]", "-", name), given)


def read_api_keys(text: bytes, origin: str) -> tuple[bytes, ...]:
    """Return the keys, one a line; UserError where there is none, or one that no header could carry."""
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UserError(f"{origin}: no API key; write one a line")
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise UserError(f"{origin}: key {number} must be 8 to 512 visible ASCII characters")
    return keys
