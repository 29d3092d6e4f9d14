"""Load a model from a folder, a GGUF file or the Hugging Face Hub."""

import re
from pathlib import Path

import torch

from gemmule.errors import ModelError
from gemmule.formats import adapter
from gemmule.formats.folder import load_folder
from gemmule.formats.gguf import load_gguf
from gemmule.formats.gguf_file import is_gguf
from gemmule.formats.hub import fetch
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import local_path, path_kind
from gemmule.run_folder import RECIPE_FILE
from gemmule.tokenizer import Tokenizer


def open_model(source: str | Path, dtype: torch.dtype | None = None) -> tuple[Gemma3, Tokenizer]:
    """Load model and tokenizer from a model folder, a GGUF file, or `owner/name` of the Hub.

    Weights keep their dtype unless one is given; downloads and skipped tensors are logged. Raises ModelError or
    TokenizerError.
    """
    found = find_model(source)
    if path_kind(found, ModelError) == "folder":
        model, tokenizer = load_folder(found, dtype=dtype)
    else:
        model, tokenizer = load_gguf(found, dtype=dtype or torch.float32)
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    # Google's 1B has no embedding of <image_soft_token>, which no text is encoded to.
    if ids > rows and any(tokenizer.token_bytes()[rows:]):
        raise ModelError(f"{source}: the tokenizer has {ids} ids, but the model has a vocabulary of {rows}")
    return model, tokenizer


def find_model(source: str | Path) -> Path:
    """Return the folder or GGUF file of a MODEL, downloaded from the Hub where no such path exists; else ModelError.

    GGUF files are recognized by their magic bytes, because Ollama's have no suffix.
    """
    path = local_path(source)
    kind = path_kind(path, lambda message: ModelError(f"MODEL {message}"))
    if kind == "folder":
        _refuse_folder_of_models(path)
        return path
    if path.suffix.lower() == ".gguf" or (kind == "file" and is_gguf(path)):
        return path
    if is_repository(path):
        return fetch(str(source))
    advice = "name a model folder or a run folder, a .gguf file, or owner/name of the Hugging Face Hub"
    raise ModelError(f"MODEL {source}: {'no such folder' if kind is None else 'not a folder'}; {advice}")


def _refuse_folder_of_models(folder: Path) -> None:
    """Refuse a folder of models, and name the models in it."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelError(f"MODEL {folder}: cannot be read: {error.strerror}") from None
    marks = (RECIPE_FILE, "config.json", adapter.CONFIG)
    if not set(names).isdisjoint(marks):
        return
    shown = [name for name in names if not name.startswith(".")]  # temporary folders
    inner = [name for name in shown if any(path_kind(folder / name / mark, ModelError) for mark in marks)]
    inner += [name for name in shown if name.lower().endswith(".gguf")]
    if inner:
        listed = ", ".join(inner[:8]) + (f" and {len(inner) - 8} more" if inner[8:] else "")
        raise ModelError(
            f"MODEL {folder}: is not a model but a folder of models: {listed}; name one, such as {folder / inner[0]}"
        )


def is_repository(path: Path) -> bool:
    """Whether a name is `owner/name` of the Hub and not a mistyped path."""
    plain = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix(), re.ASCII)
    return plain is not None and path_kind(path.parent, ModelError) is None
