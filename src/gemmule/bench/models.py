"""A model folder to measure with, where none is named."""

from pathlib import Path

import torch

from gemmule.data.storybook import stories
from gemmule.errors import ModelError
from gemmule.formats.folder import save_folder
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import initialise
from gemmule.tokenizer.training import train_tokenizer
from gemmule.train.run import Recipe


def shape_of(recipe: Recipe) -> Gemma3Config:
    """Return a recipe's shape; where it leaves the vocabulary to the data, the tokenizer is to have all its ids."""
    if "vocab_size" in recipe.model.model_fields_set:
        return recipe.model
    return recipe.model.replace(vocab_size=recipe.tokenizer.vocab_size)


def write_untrained(recipe: Recipe, folder: Path) -> None:
    """Write a model of a recipe's shape that has learned nothing; its tokenizer has fewer ids than it has rows."""
    config = shape_of(recipe)
    tokenizer = train_tokenizer((story.text for story in stories(200, seed=0)), min(512, config.vocab_size))
    model = Gemma3(config)
    initialise(model, recipe.train.seed)
    folder.mkdir(parents=True)
    save_folder(model.eval(), tokenizer, folder, torch.bfloat16)  # as Google publishes its own


def read_once(path: Path) -> int:
    """Read a file, or all files of a folder, so that every side finds them in memory; return their bytes.

    ModelError where there is nothing.
    """
    if not path.exists():
        raise ModelError(f"--model {path}: no such folder; name a model folder, which others can open too")
    size = 0
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while part := stream.read(2**24):
                    size += len(part)
    return size
