"""Newer checkpoints of runs that are being trained, taken up between requests."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from gemmule.errors import GemmuleError, UserError
from gemmule.reading import local_path
from gemmule.serve.engine_thread import EngineThread
from gemmule.serve.models import load_model
from gemmule.serve.settings import ServerSettings
from gemmule.train.checkpoint import checkpoints

log = logging.getLogger(__name__)


def check_followed(settings: ServerSettings) -> None:
    """Raise UserError where no model is a run, which alone has newer checkpoints."""
    if not any(map(settings.follows, settings.models)):
        named = ", ".join(spec.model for spec in settings.models)
        raise UserError(f"--follow: {named} is no run folder; name one, or leave --follow out")


async def follow(engine: EngineThread, settings: ServerSettings, note: Callable[[str], None]) -> None:
    """Look for newer checkpoints until cancelled; one that cannot be read costs a warning."""
    seen: dict[str, Path] = {}
    while True:
        await asyncio.sleep(settings.follow_seconds)
        for spec in filter(settings.follows, settings.models):
            served, found = engine.models.get(spec.id), checkpoints(local_path(spec.model))
            if served is None or not found or found[0] in (served.path, seen.get(spec.id)):
                continue
            seen[spec.id] = found[0]
            try:
                loaded = await asyncio.to_thread(load_model, spec, settings, len(settings.models))
            except (GemmuleError, OSError) as error:
                log.warning("%s: %s was not taken up: %s", spec.id, found[0].name, error)
                continue
            if loaded.path != served.path:
                engine.replace(loaded)
                note(f"{spec.id}: serves {loaded.path.name} now")
