"""Training adapters: the settings of `[lora]`, and which rows of the vocabulary learn."""

import logging
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from gemmule.errors import RecipeError
from gemmule.fields import Count, Noun, Positive, Text
from gemmule.formats.adapter import TARGETS, Base
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.model.lora import LoRA, add_lora
from gemmule.settings import Problem, Settings
from gemmule.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Where none is set: four times the default for all weights; ten times is usual (Schulman et al., LoRA Without Regret,
# 2025), and no sweep was made here.
LORA_LEARNING_RATE = 1e-3
TURNS, NO_ROWS = "turns", "none"
# Cosine with the most similar other row from which a row counts as never learned: what no text has taught moves by the
# same gradient as all other such rows. Measured: 0.99 in models of stories and 0.96 to 1.00 in Google's 270M, where
# tokens of texts have 0.3 to 0.9. Norms do not tell: Google's rows all have the same.
_ALIKE = 0.95
_COMPARED = 2**15  # rows at once


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Text, ...], Field(strict=False), BeforeValidator(_listed)]


class LoRASettings(Settings):
    """Adapters (LoRA, DoRA): low-rank updates that learn while the weights of `train.start` are frozen.

    The optimizer's learning rate is 1e-3 then, unless it is set.
    """

    rank: Count | None = Field(None, description="rank of the adapters; unset, all weights of the model are trained")
    alpha: Positive | None = Field(
        None, description="the update is scaled by alpha / rank; unset, alpha is twice the rank"
    )
    targets: Annotated[Names, Noun("a list of modules")] = Field(
        tuple(TARGETS), min_length=1, description=f"matrices with an adapter, of {', '.join(TARGETS)}"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout of the adapters' inputs")
    rank_stabilized: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    dora: bool = Field(False, description="learn the length of each row of the adapted matrices, too (DoRA)")
    token_rows: Annotated[Names, Noun("a list of texts")] = Field(
        (TURNS,),
        description="tokens whose rows of the vocabulary learn, as embedding and as head: turns, which are "
        "<start_of_turn> and <end_of_turn> where the base never learned them; none; or a list of tokens",
    )
    base_precision: Annotated[Literal["auto", "bf16", "fp32"], Noun('"auto", "bf16" or "fp32"')] = Field(
        "auto", description="dtype of the frozen weights; auto: bf16 where train.precision is, and nothing is sharded"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield settings without a rank, and matrices that do not exist."""
        if self.rank is None:
            for key, value in sorted(self.changed().items()):
                yield Problem(key, value, "is for adapters; set lora.rank, too")
        for name in self.targets:
            if name not in TARGETS:
                yield Problem("targets", name, f"no such matrix; there are {', '.join(TARGETS)}")


class Adapter(NamedTuple):
    """The adapter of a run, and the base that it is trained on."""

    lora: LoRA
    base: Base


def lora_of_settings(settings: LoRASettings, model: Gemma3, tokenizer: Tokenizer) -> LoRA:
    """Return the kind of adapter that settings ask for on a base; RecipeError for tokens that it cannot learn."""
    return _kind(settings, _rows(settings.token_rows, model, tokenizer))


def expected_lora(settings: LoRASettings, vocab_size: int) -> LoRA | None:
    """Return the kind of adapter of settings where the base is not at hand: turn tokens are taken to learn."""
    if settings.rank is None:
        return None
    names = [name for name in settings.token_rows if name != NO_ROWS]
    rows = tuple(range(min(vocab_size, 2 if names == [TURNS] else len(names))))
    return _kind(settings, rows)


def _kind(settings: LoRASettings, rows: tuple[int, ...]) -> LoRA:
    assert settings.rank is not None
    targets = tuple(dict.fromkeys(TARGETS[name] for name in settings.targets))
    alpha = 2.0 * settings.rank if settings.alpha is None else settings.alpha
    return LoRA(settings.rank, alpha, targets, settings.dropout, settings.rank_stabilized, settings.dora, rows)


def _rows(names: tuple[str, ...], model: Gemma3, tokenizer: Tokenizer) -> tuple[int, ...]:
    tied = model.config.tie_word_embeddings
    if names == (TURNS,):
        turns = [i for i in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) if i is not None]
        alike = similarities(model.embedding.weight, turns)
        chosen = tuple(i for i, cosine in zip(turns, alike, strict=True) if cosine >= _ALIKE)
        if chosen and not tied:
            log.info("lora.token_rows: the base never learned its turn tokens, and its head is not tied: they stay")
        elif chosen:
            listed = ", ".join(f"{tokenizer.special_tokens[i]} ({alike[turns.index(i)]:.3f})" for i in chosen)
            log.info(
                f"lora.token_rows: the rows of {listed} learn, too: the base never learned them, for each points where "
                "a row of another token does (cosine)"
            )
        return chosen if tied else ()
    wanted = [name for name in names if name != NO_ROWS]
    found = [(name, _token_id(name, tokenizer)) for name in wanted]
    for name, number in found:
        if number is None or number >= model.config.vocab_size:
            raise RecipeError(str(Problem("lora.token_rows", name, "is no token of the model of train.start")))
    if found and not tied:
        raise RecipeError(str(Problem("lora.token_rows", wanted, "the model's head is not its embedding; use none")))
    return tuple(dict.fromkeys(number for _, number in found if number is not None))


def _token_id(name: str, tokenizer: Tokenizer) -> int | None:
    """Return the id of a special token, or of a text that is one token."""
    for number, special in tokenizer.special_tokens.items():
        if special == name:
            return number
    ids = tokenizer.encode(name)[tokenizer.adds_bos :]
    return ids[0] if len(ids) == 1 else None


@torch.no_grad()
def similarities(embedding: Tensor, ids: list[int]) -> list[float]:
    """Return for each of some rows of an embedding (V,D) its cosine with the most similar other row."""
    if not ids:
        return []
    own = torch.nn.functional.normalize(embedding[ids].float(), dim=1)
    best = torch.full((len(ids),), -1.0, dtype=torch.float32)
    for first in range(0, len(embedding), _COMPARED):
        part = torch.nn.functional.normalize(embedding[first : first + _COMPARED].float(), dim=1)
        cosines = own @ part.T
        for place, number in enumerate(ids):
            if first <= number < first + _COMPARED:
                cosines[place, number - first] = -1.0
        best = torch.maximum(best, cosines.amax(dim=1).cpu())
    return best.tolist()


def describe_adapter(config: Gemma3Config, adapter: Adapter, dtype: torch.dtype) -> str:
    """Describe in a line what learns, and on what."""
    model = meta_model(config)
    add_lora(model, adapter.lora)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    lora = adapter.lora
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rank_stabilized else "LoRA"
    rows = f" and {len(lora.rows)} rows of the vocabulary" if lora.rows else ""
    return (
        f"{kind} of rank {lora.rank} on {len(lora.targets)} matrices a layer{rows}: {learning:,} parameters learn, "
        f"{frozen:,} are frozen in {str(dtype).removeprefix('torch.')}"
    )
