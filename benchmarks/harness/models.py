"""Model folders for benchmarks without --model."""

from pathlib import Path

import torch

from gemmule.errors import ModelError
from gemmule.formats.folder import save_folder
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.storybook import stories
from gemmule.tokenizer.training import train_tokenizer
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import resolve_vocabulary


def write_untrained(recipe: Recipe, folder: Path) -> None:
    """Write a randomly initialized model of a recipe's shape, with a tokenizer of up to 512 ids."""
    config = resolve_vocabulary(recipe).model
    tokenizer = train_tokenizer((story.text for story in stories(200, seed=0)), min(512, config.vocab_size))
    model = Gemma3(config)
    init_weights(model, recipe.train.seed)
    folder.mkdir(parents=True)
    save_folder(model.eval(), tokenizer, folder, torch.bfloat16)  # as Google publishes its own


def read_once(path: Path) -> int:
    """Read a file, or all files of a folder, into the page cache; return their bytes.

    ModelError where there is none.
    """
    if not path.exists():
        raise ModelError(f"--model {path}: no such folder; name a model folder, which peers can open, too")
    size = 0
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while part := stream.read(2**24):
                    size += len(part)
    return size
