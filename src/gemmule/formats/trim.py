"""The model folder of a trimmed model: the same weights with the embedding rows of the ids that are kept."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.files import atomic_folder
from gemmule.formats.folder import save_folder
from gemmule.formats.model_card import CARD, ModelCard, write_card
from gemmule.model.gemma3 import Gemma3, all_logits
from gemmule.model.init import meta_model
from gemmule.reading import path_kind
from gemmule.tokenizer import Tokenizer

VOCABULARY = "vocabulary.json"
_LEGAL = re.compile(r"licen[cs]e|notice|terms|copying|use_policy", re.IGNORECASE)
# What Gemma's terms ask to be said.
_GEMMA = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


class TrimmedModel(NamedTuple):
    """A trimmed model; `old_ids[new]` is the original's id of each id."""

    model: Gemma3
    tokenizer: Tokenizer
    old_ids: Sequence[int]


def trim_model(model: Gemma3, kept: Sequence[int]) -> Gemma3:
    """Return the model with the vocabulary entries `kept`, an ascending list of ids; other weights are shared.

    ModelError where one of them has no embedding.
    """
    rows = model.config.vocab_size
    if kept[-1] >= rows:
        raise ModelError(f"the model has no embedding of the id {kept[-1]}, which its tokenizer needs; it has {rows}")
    chosen = torch.tensor(kept, dtype=torch.long, device=model.embedding.weight.device)
    of_vocabulary = ("embedding.weight", "head.weight")
    state = {name: tensor[chosen] if name in of_vocabulary else tensor for name, tensor in model.state_dict().items()}
    trimmed = meta_model(model.config.model_copy(update={"vocab_size": len(kept)}), model.kernel)
    trimmed.load_state_dict(state, assign=True)
    return trimmed.eval()


@torch.no_grad()
def logits_are_equal(model: Gemma3, trimmed: TrimmedModel, ids: Sequence[int]) -> bool:
    """Whether both models have the same logits of the kept ids, to the last bit, after each of `ids` (new ones).

    The original's output head computes the kept rows alone, in the same matmul: how a library divides a larger one is
    no property of the model.
    """
    chosen = torch.tensor(trimmed.old_ids, dtype=torch.long)
    tokens = torch.tensor([ids], dtype=torch.long)

    def kept_logits(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        return all_logits(hidden, vocabulary[chosen])

    return torch.equal(model(chosen[tokens], output_head=kept_logits), trimmed.model(tokens))


def save_trimmed(trimmed: TrimmedModel, out: Path, source: Path, card: ModelCard, name: str, old_size: int) -> None:
    """Write the model folder, with `vocabulary.json` (the original's id of each id) and a README of what was modified.

    License and notice files are copied from `source` where it is a folder. `name` and `old_size` are the original's.
    """
    with atomic_folder(out, last="config.json") as folder:
        copied = _copy_legal_files(source, folder)
        save_folder(trimmed.model, trimmed.tokenizer, folder)
        old_ids = json.dumps({"old_ids": list(trimmed.old_ids)})
        (folder / VOCABULARY).write_text(old_ids + "\n", encoding="utf-8")
        write_card(card, folder)
        with (folder / CARD).open("a", encoding="utf-8") as file:
            file.write(_notice(trimmed, card, name, old_size, copied))


def _notice(trimmed: TrimmedModel, card: ModelCard, name: str, old_size: int, copied: Sequence[str]) -> str:
    text = (
        f"# {name}, trimmed\n\nThis is a modified copy of {name}: `gemmule trim` reduced its vocabulary from "
        f"{old_size:,} to {len(trimmed.old_ids):,} ids. The embedding has the rows of these ids, the tokenizer has "
        f"their pieces and merges, and all other weights are as they were. `{VOCABULARY}` lists the original's id of "
        "each id.\n"
    )
    if card.license == "gemma":
        text += f"\n{_GEMMA}\n"
    return text + (f"\nCopied from the original: {', '.join(copied)}.\n" if copied else "")


def _copy_legal_files(source: Path, folder: Path) -> list[str]:
    if path_kind(source) != "folder":
        return []
    files = [file for file in sorted(source.iterdir()) if _LEGAL.search(file.name) and path_kind(file) == "file"]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]
