"""The description of the API at /openapi.json."""

from typing import Any

from gemmule.serve.settings import ServerSettings


def describe(settings: ServerSettings) -> dict[str, Any]:
    """Return the OpenAPI document; `model` is one of those that are served."""
    return {"openapi": "3.1.0", "paths": {}}
