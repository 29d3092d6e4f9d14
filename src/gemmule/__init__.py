"""Grow your own Gemma 3: from raw text to a trained, measured language model.

import gemmule
model, tokenizer = gemmule.load("runs/story/model")
for event in gemmule.generate(model, tokenizer, "Once upon a time", max_new_tokens=64):
    print(event.text, end="")
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmule.generate.engine import generate as generate
    from gemmule.model.gemma3 import Gemma3
    from gemmule.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load"]


def load(model: str | Path, device: str = "cpu") -> tuple["Gemma3", "Tokenizer"]:
    """Open a MODEL, ready to predict on a device.

    MODEL is a model folder (ours or Hugging Face's), a run folder (its newest good checkpoint), a .gguf file, or
    owner/name, which is fetched from the Hugging Face Hub.
    """
    from gemmule.errors import ModelError
    from gemmule.formats.opening import open_model
    from gemmule.runtime import choose_device

    folder = Path(model)
    if not (folder / "config.json").exists() and (folder / "recipe.toml").exists():
        from gemmule.train.checkpoint import newest_checkpoint  # slow to load, so only where it is needed

        newest, damage = newest_checkpoint(folder)
        if newest is None:
            raise ModelError(f"MODEL {folder}: a run without a good checkpoint yet" + "".join(f"; {d}" for d in damage))
        model = newest
    network, tokenizer = open_model(model)
    return network.to(choose_device(device)), tokenizer


def __getattr__(name: str) -> Any:
    """Fetch `generate` when it is first used, so that importing gemmule does not load torch."""
    if name == "generate":
        return importlib.import_module("gemmule.generate.engine").generate
    raise AttributeError(f"module 'gemmule' has no attribute {name!r}")
