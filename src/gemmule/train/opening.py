"""Open any MODEL, run folders included."""

from pathlib import Path

import torch

from gemmule.errors import ModelError, UserError
from gemmule.formats.opening import find_model, open_model
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import local_path, path_kind
from gemmule.run_folder import RECIPE_FILE
from gemmule.runtime import choose_device
from gemmule.tokenizer import Tokenizer


def load_with_path(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Gemma3, Tokenizer, Path]:
    """Open a MODEL as `gemmule.load` does, and return also the folder or file that it was opened from.

    What is downloaded and ignored is logged. `dtype` is the one of the weights, by default as stored.
    """
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
