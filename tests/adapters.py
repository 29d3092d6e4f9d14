"""Adapters for tests: a model with some, and folders of a base and of an adapter on it."""

from pathlib import Path

import torch

from gemmule.formats.adapter import Base, adapter_tensors, save_adapter, weights_sha256
from gemmule.formats.folder import load_folder, save_folder
from gemmule.model.gemma3 import Gemma3
from gemmule.model.lora import LoRA, add_lora, init_lora
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config


def write_base(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """Write a model folder; return it."""
    folder.mkdir(parents=True)
    save_folder(lively_model(tiny_config(vocab_size=380, tie_word_embeddings=True), seed=seed), tokenizer, folder)
    return folder


def enliven(model: Gemma3, seed: int, size: float = 0.05) -> None:
    """Move every number of a model's adapter far from its first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def write_adapter(folder: Path, base: Path, lora: LoRA, seed: int = 2) -> Gemma3:
    """Write an adapter far from the identity; return the base with it, not merged."""
    model, _ = load_folder(base)
    sha256 = weights_sha256(model)
    add_lora(model, lora)
    init_lora(model, seed)
    enliven(model, seed)
    folder.mkdir(parents=True)
    save_adapter(lora, adapter_tensors(model), Base(str(base), sha256), folder)
    return model.eval()
