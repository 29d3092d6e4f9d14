"""Plausible mistakes in how a model's weights are read, each tried on the model in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from gemmule.model.config import Gemma3Config, Kind
from gemmule.model.gemma3 import MLP, Gemma3, RMSNorm

BASES = (10_000.0, 100_000.0, 1_000_000.0)
FACTORS = (1.0, 2.0, 4.0, 8.0)
_WINDOW_FACTORS = (2, 4, 8)
_UNSCALED = 1  # a hidden size whose square root, the scale of embeddings, is 1


class _ShiftedConfig(Gemma3Config):
    """A config whose global layers come `shift` layers earlier."""

    shift: int = 0

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        pattern = self.sliding_window_pattern
        return tuple(
            "global" if (layer + 1 + self.shift) % pattern == 0 else "local" for layer in range(self.num_hidden_layers)
        )


@dataclass(frozen=True)
class Reading:
    """How weights and text are read: by which config, and what is taken to be stored where."""

    config: Gemma3Config
    bos: bool
    layer_shift: int = 0
    gate_up_swapped: bool = False
    gain_is_weight: bool = False
    embedding_scale: bool = True

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        """Whether each layer is local or global."""
        return self.effective_config().layer_kinds

    def effective_config(self) -> Gemma3Config:
        """Return the config that makes the forward pass compute this reading."""
        values = dict(self.config)
        if not self.embedding_scale:
            values["hidden_size"] = _UNSCALED
        return _ShiftedConfig.model_construct(**values, shift=self.layer_shift)


class Variant(NamedTuple):
    """One change to a reading: the checks that it concerns, its value, and how a finding begins that blames it."""

    names: tuple[str, ...]
    value: str
    claim: str
    change: Callable[[Reading], Reading]
    tokens_needed: int = 2  # of one piece, so that the change can make a difference


@contextmanager
def applied(model: Gemma3, reading: Reading) -> Iterator[None]:
    """Let a model compute a reading; on exit it is as it was, bit for bit."""
    config = model.config
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)] if reading.gain_is_weight else []
    kept = [norm.weight.detach().clone() for norm in norms]
    mlps = [each for each in model.modules() if isinstance(each, MLP)] if reading.gate_up_swapped else []
    try:
        model.config = reading.effective_config()
        with torch.no_grad():
            for norm in norms:
                norm.weight.sub_(1)
        for mlp in mlps:
            mlp.gate, mlp.up = mlp.up, mlp.gate
        yield
    finally:
        model.config = config
        for mlp in mlps:
            mlp.gate, mlp.up = mlp.up, mlp.gate
        with torch.no_grad():
            for norm, weight in zip(norms, kept, strict=True):
                norm.weight.copy_(weight)


def variants(config: Gemma3Config, adds_bos: bool, has_bos: bool) -> Iterator[Variant]:
    """Yield the changes that are tried; a key of the config that the model does not use has none."""
    kinds = set(config.layer_kinds)
    if "global" in kinds:
        yield from _numbers("rope_theta", config.rope_theta, BASES)
        yield from _numbers("rope_scaling_factor", config.rope_scaling_factor, FACTORS)
    if "local" in kinds:
        yield from _numbers("rope_local_base_freq", config.rope_local_base_freq, BASES)
        yield from _windows(config.sliding_window)
    if len(kinds) == 2:
        yield from _swapped_bases(config)
        yield from _shifts(config)
    yield Variant(
        ("gate_up",),
        "exchanged",
        "mlp.gate_proj.weight and mlp.up_proj.weight of every layer; exchanging them",
        lambda reading: replace(reading, gate_up_swapped=not reading.gate_up_swapped),
    )
    yield Variant(
        ("norms",),
        "gain weight",
        "the weights of the norms seem to hold 1 + w instead of w; gain weight instead of 1 + weight",
        lambda reading: replace(reading, gain_is_weight=True),
    )
    yield Variant(
        ("embedding_scale",),
        "no scale",
        "embed_tokens.weight seems to be multiplied by sqrt(hidden_size) already; leaving out that scale",
        lambda reading: replace(reading, embedding_scale=False),
    )
    if has_bos:
        stated, other = ("begins", "none") if adds_bos else ("does not begin", "one")
        yield Variant(
            ("bos",),
            "no bos" if adds_bos else "with bos",
            f"by tokenizer.json's post_processor a text {stated} with bos; {other}",
            lambda reading: replace(reading, bos=not reading.bos),
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _config_change(**values: float) -> Callable[[Reading], Reading]:
    return lambda reading: replace(reading, config=reading.config.model_copy(update=values))


def _of_key(key: str, configured: float, value: float, tokens_needed: int = 2) -> Variant:
    claim = f"config.json has {key} = {_number(configured)}; {_number(value)}"
    return Variant((key,), _number(value), claim, _config_change(**{key: value}), tokens_needed)


def _numbers(key: str, configured: float, others: tuple[float, ...]) -> Iterator[Variant]:
    yield from (_of_key(key, configured, value) for value in others if value != configured)


def _windows(configured: int) -> Iterator[Variant]:
    others = {configured - 1, configured + 1}
    others |= {configured // factor for factor in _WINDOW_FACTORS} | {configured * factor for factor in _WINDOW_FACTORS}
    for value in sorted(others - {0, configured}):
        yield _of_key("sliding_window", configured, value, tokens_needed=min(value, configured) + 1)


def _swapped_bases(config: Gemma3Config) -> Iterator[Variant]:
    theta, local = config.rope_theta, config.rope_local_base_freq
    if theta != local:
        yield Variant(
            ("rope_theta", "rope_local_base_freq"),
            f"{_number(local)} and {_number(theta)}",
            f"config.json has rope_theta = {_number(theta)} and rope_local_base_freq = {_number(local)}; swapping them",
            _config_change(rope_theta=local, rope_local_base_freq=theta),
        )


def _shifts(config: Gemma3Config) -> Iterator[Variant]:
    tried = {config.layer_kinds}
    for shift in range(1, config.sliding_window_pattern):
        kinds = Reading(config, bos=True, layer_shift=shift).layer_kinds
        if kinds not in tried:
            tried.add(kinds)
            yield Variant(
                ("layer_types",),
                _global_layers(kinds),
                f"config.json's layer_types (sliding_window_pattern) have {_global_layers(config.layer_kinds)}; "
                f"{_global_layers(kinds)}",
                partial(_shift, shift),
            )


def _shift(shift: int, reading: Reading) -> Reading:
    return replace(reading, layer_shift=shift)


def _global_layers(kinds: tuple[Kind, ...]) -> str:
    numbers = [str(layer) for layer, kind in enumerate(kinds) if kind == "global"]
    shown = ", ".join(numbers[:3]) + (", ..." if len(numbers) > 3 else "")
    return f"global layers {shown}" if numbers else "no global layer"
