"""The model folder, as Hugging Face lays it out: config.json, model.safetensors, tokenizer.json and their kin."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemmule.errors import ModelError
from gemmule.formats.config_json import read_config, read_json, write_config, write_json
from gemmule.formats.names import foreign_names
from gemmule.formats.safetensors_reader import WEIGHTS, read_survey, survey
from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import unfilled
from gemmule.tokenizer import Tokenizer


def save_folder(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write model and tokenizer into an existing folder; transformers, vLLM and `load_folder` open it.

    Weights are stored as they are, or as `dtype`.
    """
    config, state = model.config, model.state_dict()
    tensors = {
        theirs: state[ours].detach().to("cpu", dtype).contiguous()
        for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_settings(model, tokenizer, folder, dtype)
    # The library lets nobody but the owner read what it writes.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def save_settings(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write all of a model folder but the weights."""
    stored = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    ends = [i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None]
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "config.json", write_config(model.config, tokenizer) | {"dtype": stored, "torch_dtype": stored})
    write_json(folder / "generation_config.json", generation | {"do_sample": True})
    tokenizer.save(folder)


def load_folder(
    folder: Path, kernel: str = "sdpa", dtype: torch.dtype | None = None, say: Callable[[str], None] = lambda _: None
) -> tuple[Gemma3, Tokenizer]:
    """Open a folder of any Gemma 3, every tensor of its text model used exactly once.

    The weights keep the dtype that they are stored in unless one is given, and are mapped into memory, not read. The
    text part of a multimodal model is taken, and `say` told. ModelError names what is missing, left over or misshapen.
    """
    origin = folder / "config.json"
    config = read_config(read_json(origin), origin)
    shelf = survey(folder)
    if config.num_hidden_layers > len(shelf.tensors):
        told = f"{config.num_hidden_layers} layers, but {shelf.origin.name} has {len(shelf.tensors)} tensors of them"
        raise ModelError(f"{origin}: num_hidden_layers tells of {told}")
    model = unfilled(config, kernel)
    model.load_state_dict(read_survey(shelf, model, dtype, say), assign=True)
    return model.eval(), Tokenizer.load(folder)
