"""Grow your own Gemma 3: from raw text to a trained, measured language model.

import gemmule
model, tokenizer = gemmule.load("runs/story/model")
for event in gemmule.generate(model, tokenizer, "Once upon a time", max_new_tokens=64):
    print(event.text, end="")
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmule.inference.engine import generate as generate
    from gemmule.model.gemma3 import Gemma3
    from gemmule.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load"]


def load(model: str | Path, device: str = "cpu", adapters: Sequence[str | Path] = ()) -> tuple["Gemma3", "Tokenizer"]:
    """Open a MODEL, ready to predict on a device.

    MODEL is a model folder (ours or Hugging Face's), a run folder (its newest good checkpoint), a GGUF file, the folder
    of an adapter (PEFT's), or owner/name, which is fetched from the Hugging Face Hub. Adapters are merged into it.
    ModelError where it is none of these, or damaged.
    """
    from gemmule.train.opening import load_with_path

    network, tokenizer, _ = load_with_path(model, device, adapters=adapters)
    return network, tokenizer


def __getattr__(name: str) -> Any:
    """Fetch `generate` when it is first used, so that importing gemmule does not load torch."""
    if name == "generate":
        return importlib.import_module("gemmule.inference.engine").generate
    raise AttributeError(f"module 'gemmule' has no attribute {name!r}")
