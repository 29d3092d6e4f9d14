"""The model folder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json and others."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from gemmule.errors import ModelError
from gemmule.formats.config_json import read_config, read_json, write_config, write_json
from gemmule.formats.names import tensor_name_pairs
from gemmule.formats.safetensors_reader import WEIGHTS, load_tensors, read_tensor_index
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.tokenizer import Tokenizer


def save_folder(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write model and tokenizer into an existing folder; transformers, vLLM and `load_folder` open it.

    Weights are stored as they are, or as `dtype`.
    """
    config, state = model.config, model.state_dict()
    tensors = {
        theirs: state[ours].detach().to("cpu", dtype).contiguous()
        for ours, theirs in tensor_name_pairs(config.num_hidden_layers, config.tie_word_embeddings)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_settings(model, tokenizer, folder, dtype)
    # safetensors writes files that only the owner can read.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def save_settings(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the config and tokenizer files of a model folder, without the weights."""
    stored = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(folder / "config.json", write_config(model.config, tokenizer) | {"dtype": stored, "torch_dtype": stored})
    write_json(folder / "generation_config.json", generation | {"do_sample": True})
    tokenizer.save(folder)


def load_folder(folder: Path, kernel: str = "sdpa", dtype: torch.dtype | None = None) -> tuple[Gemma3, Tokenizer]:
    """Load model and tokenizer from a folder of any Gemma 3, every tensor of the text model used exactly once.

    Weights keep their stored dtype unless one is given, and are memory-mapped. Of a multimodal model the text model is
    loaded, which is logged. ModelError names missing, unexpected and misshapen tensors.
    """
    origin = folder / "config.json"
    config = read_config(read_json(origin), origin)
    index = read_tensor_index(folder)
    if config.num_hidden_layers > len(index.tensors):
        stored = f"{index.origin.name} has only {len(index.tensors)} tensors"
        raise ModelError(f"{origin}: num_hidden_layers is {config.num_hidden_layers}, but {stored}")
    model = meta_model(config, kernel)
    model.load_state_dict(load_tensors(index, model, dtype), assign=True)
    return model.eval(), Tokenizer.load(folder)
