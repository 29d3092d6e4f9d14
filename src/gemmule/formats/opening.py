"""One way to open a model, whatever it is: a folder, a .gguf file, or a name on the Hugging Face Hub."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from gemmule.errors import ModelError
from gemmule.formats.folder import load_folder
from gemmule.formats.gguf import load_gguf
from gemmule.formats.hub import fetch
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer


def open_model(
    source: str | Path, say: Callable[[str], None] = lambda _: None, dtype: torch.dtype | None = None
) -> tuple[Gemma3, Tokenizer]:
    """Open a model folder, a .gguf file, or `owner/name`, which is fetched from the Hub where it is no path here.

    The weights keep their dtype unless one is given; `say` is told what is fetched and what is left aside. Raises
    ModelError or TokenizerError.
    """
    path = Path(source)
    if path.is_dir() or path.suffix.lower() == ".gguf":
        found = path
    elif _is_repository(path):
        found = fetch(str(source), say)
    else:
        advice = "name a model folder or a run folder, a .gguf file, or owner/name of the Hugging Face Hub"
        raise ModelError(f"MODEL {source}: {'no folder' if path.exists() else 'no such folder'}; {advice}")
    if found.is_dir():
        model, tokenizer = load_folder(found, dtype=dtype, say=say)
    else:
        model, tokenizer = load_gguf(found, dtype=dtype or torch.float32)
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    # Google's 1B has no row for <image_soft_token>; no text leads to it.
    if ids > rows and any(tokenizer.token_bytes()[rows:]):
        raise ModelError(f"{source}: the tokenizer has {ids} ids, the model {rows}; they do not belong together")
    return model, tokenizer


def _is_repository(path: Path) -> bool:
    """Tell `owner/name` from a mistyped path: that has other parts, or its first one is a folder here."""
    plain = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix(), re.ASCII)
    return plain is not None and not path.parent.exists() and not path.exists()
