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
    import torch

    from gemmule.inference.engine import generate as generate
    from gemmule.model.gemma3 import Gemma3
    from gemmule.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load"]


def load(model: str | Path, device: str = "cpu") -> tuple["Gemma3", "Tokenizer"]:
    """Open a MODEL, ready to predict on a device.

    MODEL is a model folder (ours or Hugging Face's), a run folder (its newest good checkpoint), a GGUF file, or
    owner/name, which is fetched from the Hugging Face Hub. ModelError where it is none of these, or damaged.
    """
    network, tokenizer, _ = load_with_path(model, device)
    return network, tokenizer


def load_with_path(
    model: str | Path,
    device: str = "cpu",
    dtype: "torch.dtype | None" = None,
) -> tuple["Gemma3", "Tokenizer", Path]:
    """Open a MODEL as `load` does, and return also the folder or file that it was opened from.

    What is downloaded and ignored is logged. `dtype` is the one of the weights, by default as stored.
    """
    from gemmule.errors import ModelError, UserError
    from gemmule.formats.opening import find_model, open_model
    from gemmule.reading import local_path, path_kind
    from gemmule.run_folder import RECIPE_FILE
    from gemmule.runtime import choose_device

    target, run = choose_device(device), local_path(model)
    path_kind(run, lambda message: ModelError(f"MODEL {message}"))
    is_run = path_kind(run / RECIPE_FILE, ModelError) and not path_kind(run / "config.json", ModelError)
    if not is_run:
        found = find_model(model)
        network, tokenizer = open_model(found, dtype)
        return network.to(target), tokenizer, found
    from gemmule.train.checkpoint import checkpoints, newest_checkpoint  # slow to load, so only where it is needed

    while True:
        present = checkpoints(run)
        newest, damage = newest_checkpoint(run, weights_only=True)
        try:
            if newest is None:
                damaged = "".join(f"; {each}" for each in damage)
                raise ModelError(f"MODEL {run}: a run without a good checkpoint yet{damaged}")
            network, tokenizer = open_model(newest, dtype)
            return network.to(target), tokenizer, newest
        except (UserError, OSError) as error:
            if checkpoints(run) == present:
                message = f"MODEL {run}: cannot be read: {error}"
                raise (error if isinstance(error, UserError) else ModelError(message)) from None
            # The run is being trained: it has written another checkpoint, and removed this one.


def __getattr__(name: str) -> Any:
    """Fetch `generate` when it is first used, so that importing gemmule does not load torch."""
    if name == "generate":
        return importlib.import_module("gemmule.inference.engine").generate
    raise AttributeError(f"module 'gemmule' has no attribute {name!r}")
