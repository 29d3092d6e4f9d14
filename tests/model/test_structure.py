"""Planted faults of the code, each found by the check that is for it; correct models pass all checks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structure_behavior as behavior
import torch
from structure_checks import CHECKS, run_checks
from structure_instruments import ModelUnderTest
from torch import Tensor, nn
from torch.nn import functional

from gemmule.data.batches import IGNORED, Batch
from gemmule.data.packing import WholeDocuments
from gemmule.model import gemma3
from gemmule.model.attention import KERNELS, AttentionMask, reference
from gemmule.model.gemma3 import Gemma3, all_logits
from gemmule.model.init import init_weights
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

Plant = Callable[[Gemma3, pytest.MonkeyPatch], None]


def fresh_model(**changes: Any) -> Gemma3:
    """Return a lively model of 7 layers and far positions."""
    return lively_model(tiny_config(**{"vocab_size": 380, "max_position_embeddings": 2048} | changes))


def failures(test: ModelUnderTest) -> dict[str, str]:
    """Return the checks that fail, and why."""
    return {name: sentence for name, (verdict, sentence) in run_checks(test).items() if verdict == "failed"}


# Planting: the smallest change that makes the fault, wherever the implementation of the many would make it.


def stack_on_the_wrong_axis(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: the turned halves are joined along time and cut apart again along width."""

    def rotate(x: Tensor, rotary: gemma3.Rotary) -> Tensor:
        cos, sin = (table[..., : x.shape[-1] // 2] for table in rotary)
        first, second = x.chunk(2, dim=-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2).reshape(x.shape)

    patch.setattr(gemma3, "rotate", rotate)


def skip_layers(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: four layers compute what nobody uses."""
    for layer in (1, 2, 3, 4):
        patch.setattr(model.blocks[layer], "forward", lambda x, *_: x)


def norm_over_the_batch(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: queries and keys are divided by the norm of the whole batch."""
    for block in model.blocks:
        for norm in (block.attention.query_norm, block.attention.key_norm):
            patch.setattr(norm, "forward", lambda x: x / x.norm())


def see_the_prefix(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: the window grows with the text."""
    patch.setattr(AttentionMask, "dense", lambda self: rule_of_window(self, None))


def begin_with_the_global_layer(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: the first layer sees everything, instead of the last of each group."""
    geometry = Gemma3._masks_and_rotary

    def swapped(*arguments: Any) -> Any:
        mask, rotary = geometry(*arguments)
        return {"local": mask["global"], "global": mask["local"]}, rotary

    patch.setattr(Gemma3, "_masks_and_rotary", swapped)


def count_padding(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """As in the seed's notebook: padding is a target like any other."""

    class Padded(WholeDocuments):
        def _batch(self, rows: Any) -> Batch:
            batch = super()._batch(rows)
            return batch._replace(targets=batch.targets.where(batch.targets != IGNORED, 0))

    patch.setattr(behavior, "WholeDocuments", Padded)


def rule_of_window(mask: AttentionMask, window: int | None) -> Tensor:
    """Return the table of the rule for another window."""
    return UNTOUCHED_RULE(AttentionMask(**fields(mask, window)))


UNTOUCHED_RULE = AttentionMask.dense


def fields(mask: AttentionMask, window: int | None) -> dict[str, Any]:
    names = ("query_positions", "key_positions", "query_documents", "key_documents")
    return {name: getattr(mask, name) for name in names} | {"window": window, "causal": True}


def window_off_by(more: int) -> Plant:
    def plant(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
        def rule(self: AttentionMask) -> Tensor:
            return rule_of_window(self, None if self.window is None else self.window + more)

        patch.setattr(AttentionMask, "dense", rule)

    return plant


def see_everything(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionMask, "dense", lambda self: torch.ones_like(UNTOUCHED_RULE(self)))


def ignore_documents(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    def rule(self: AttentionMask) -> Tensor:
        return UNTOUCHED_RULE(AttentionMask(self.query_positions, self.key_positions, self.window, causal=True))

    patch.setattr(AttentionMask, "dense", rule)


def turn_by(change: Callable[[Tensor, float, float], tuple[Tensor, float, float]]) -> Plant:
    """Change (positions, base, factor) of each kind of layer."""

    def plant(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
        tables = gemma3.rotary_tables

        def changed(positions: Tensor, head_dim: int, base: float, factor: float) -> gemma3.Rotary:
            positions, base, factor = change(positions, base, factor)
            return tables(positions, head_dim, base, factor)

        patch.setattr(gemma3, "rotary_tables", changed)

    return plant


def turn_neighbours(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, rotary: gemma3.Rotary) -> Tensor:
        cos, sin = (table[..., : x.shape[-1] // 2] for table in rotary)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    patch.setattr(gemma3, "rotate", rotate)


def turn_backwards(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    rotate = gemma3.rotate
    patch.setattr(gemma3, "rotate", lambda x, rotary: rotate(x, (rotary[0], -rotary[1])))


def turn_nothing(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gemma3, "rotate", lambda x, _: x)


def leave_keys_as_they_are(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.blocks[2].attention.key_norm, "forward", lambda x: x)


def norm_after_turning(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """Queries and keys are turned first: at position 0 that is no difference, elsewhere the gains sit on other axes."""

    def forward(self: Any, x: Tensor, rotary: gemma3.Rotary, mask: AttentionMask, cache: Any) -> Tensor:
        query = self.query_norm(gemma3.rotate(self._heads(self.query(x)), rotary))
        key = self.key_norm(gemma3.rotate(self._heads(self.key(x)), rotary))
        value = self._heads(self.value(x))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        return self.output(self.kernel(query, key, value, mask, self.scale, 0.0).transpose(1, 2).flatten(2))

    patch.setattr(gemma3.Attention, "forward", forward)


def gain_is_the_weight(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    def forward(self: gemma3.RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(gemma3.RMSNorm, "forward", forward)


def layer_norm(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    norm = model.blocks[3].pre_mlp_norm
    patch.setattr(norm, "forward", lambda x: functional.layer_norm(x, x.shape[-1:], 1 + norm.weight, eps=norm.eps))


def scale_embeddings(factor: Callable[[int], float]) -> Plant:
    def plant(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
        embed = model.embedding.forward
        patch.setattr(model.embedding, "forward", lambda tokens: embed(tokens) * factor(model.config.hidden_size))

    return plant


def change_readout(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Plant:
    """Change hidden states or vocabulary matrix on their way to the output_head."""

    def plant(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
        forward = Gemma3.forward

        def changed(self: Gemma3, *arguments: Any, output_head: Any = all_logits, **options: Any) -> Tensor:
            return forward(self, *arguments, output_head=lambda *pair: output_head(*change(*pair)), **options)

        patch.setattr(Gemma3, "forward", changed)

    return plant


def cap_logits(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    forward = Gemma3.forward

    def capped(self: Gemma3, *arguments: Any, output_head: Any = all_logits, **options: Any) -> Tensor:
        result = forward(self, *arguments, output_head=output_head, **options)
        return 3 * (result / 3).tanh() if output_head is all_logits else result

    patch.setattr(Gemma3, "forward", capped)


def activate_by(activation: Callable[[Tensor], Tensor]) -> Plant:
    def plant(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
        def forward(self: gemma3.MLP, x: Tensor) -> Tensor:
            return self.down(activation(self.gate(x)) * self.up(x))

        patch.setattr(gemma3.MLP, "forward", forward)

    return plant


def kernel(change: Callable[..., Tensor]) -> Plant:
    def plant(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
        for block in model.blocks:
            patch.setattr(block.attention, "kernel", change)

    return plant


def pair_heads_wrongly(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return reference(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), *rest)


def norm_values(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return reference(query, key, functional.normalize(value, dim=-1), *rest)


def scale_scores_by_the_head(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        patch.setattr(block.attention, "scale", model.config.head_dim**-0.5)


def norm_as_llama_does(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """What Hugging Face calls post_attention_layernorm is the norm before the MLP in Llama."""

    def forward(self: gemma3.Block, x: Tensor, rotary: Any, mask: Any, cache: Any = None) -> Tensor:
        x = x + self.attention(self.pre_attention_norm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_norm(x))

    patch.setattr(gemma3.Block, "forward", forward)


def leave_a_layer_out(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.blocks[3], "__class__", type("Passed", (gemma3.Block,), {"__call__": lambda _self, x, *_: x}))


def look_at_other_rows(model: Gemma3, patch: pytest.MonkeyPatch) -> None:
    forward = model.norm.forward
    patch.setattr(model.norm, "forward", lambda x: forward(x - 0.1 * x.mean(dim=0, keepdim=True)))


def forget_in_the_cache(_: Gemma3, patch: pytest.MonkeyPatch) -> None:
    """The cache keeps one token less than the window needs."""
    from gemmule.model import cache

    last = cache._last
    patch.setattr(cache, "_last", lambda tensor, window, dim: last(tensor, window and max(1, window - 1), dim))


@dataclass
class Fault:
    """A fault, the check that must find it, and words of the finding."""

    plant: Plant
    check: str
    words: str


SEED_FAULTS = {
    "rope mixes positions": Fault(stack_on_the_wrong_axis, "causality", "changes the predictions at"),
    "rope is no rotation": Fault(stack_on_the_wrong_axis, "rotary", "more than a rotation"),
    "dead layers": Fault(skip_layers, "gradients", "no gradient"),
    "qk norm over the whole batch": Fault(norm_over_the_batch, "qk_norm", "over the whole batch"),
    "prefix instead of a window": Fault(see_the_prefix, "window", "position 11 sees all 12 keys up to itself"),
    "global layer first": Fault(begin_with_the_global_layer, "window", "layer 0 (local): position 11 sees all 12"),
    "padding in the loss": Fault(count_padding, "padding", "padding is in the loss"),
}

CLASSIC_FAULTS = {
    "gain w instead of 1 + w": Fault(gain_is_the_weight, "norms", "weight instead of 1 + weight"),
    "gain w in qk norm": Fault(gain_is_the_weight, "qk_norm", "weight instead of 1 + weight"),
    "layer norm": Fault(layer_norm, "norms", "blocks.3.pre_mlp_norm is not RMSNorm"),
    "embeddings not scaled": Fault(scale_embeddings(lambda d: d**-0.5), "embedding", "scaled by 1 instead of"),
    "embeddings scaled twice": Fault(scale_embeddings(lambda d: d**0.5), "embedding", "scaled by 24 instead of"),
    "scaled head": Fault(change_readout(lambda h, v: (h, v * 24**0.5)), "head", "embedding.weight times 4.899"),
    "scaled hidden states": Fault(change_readout(lambda h, v: (h * 24**0.5, v)), "wiring", "the last norm"),
    "soft-cap": Fault(cap_logits, "head", "changed by more than a factor"),
    "other head": Fault(change_readout(lambda h, v: (h, v.flip(0))), "head", "changed by more than a factor"),
    "exact gelu": Fault(activate_by(functional.gelu), "mlp", "exact (erf) form"),
    "silu": Fault(activate_by(functional.silu), "mlp", "not gelu(gate) * up"),
    "window + 1": Fault(
        window_off_by(1), "window", "sees 6 keys, from position 6 to 11; the config says sliding_window = 5"
    ),
    "window - 1": Fault(window_off_by(-1), "window", "sees 4 keys"),
    "cache of another window": Fault(forget_in_the_cache, "cache", "differently from position"),
    "no mask": Fault(see_everything, "causality", "changes the predictions at"),
    "sees the future": Fault(see_everything, "window", "which comes later"),
    "padding is seen": Fault(ignore_documents, "padding", "padded documents cost"),
    "local base of global layers": Fault(
        turn_by(lambda t, _, f: (t, 1e6, f)), "rotary", "as by base 1e+06 and factor 1; the config says rope_local"
    ),
    "global base of local layers": Fault(
        turn_by(lambda t, _, f: (t, 1e4, f)), "rotary", "as by base 1e+04 and factor 4; the config says rope_theta"
    ),
    "factor on local layers": Fault(turn_by(lambda t, b, _: (t, b, 4.0)), "rotary", "(local): queries are turned as"),
    "factor forgotten": Fault(turn_by(lambda t, b, _: (t, b, 1.0)), "rotary", "base 1e+06 and factor 1"),
    "positions in bf16": Fault(
        turn_by(lambda t, b, f: (t.bfloat16(), b, f)), "rotary", "not the angle of position 257"
    ),
    "neighbours turned": Fault(turn_neighbours, "rotary", "neighbouring pairs"),
    "turned backwards": Fault(turn_backwards, "rotary", "turned backwards"),
    "not turned": Fault(turn_nothing, "rotary", "not turned at all"),
    "norm after turning": Fault(norm_after_turning, "rotary", "more than a rotation"),
    "key not normed": Fault(leave_keys_as_they_are, "qk_norm", "layer 2: the key is not normed"),
    "values normed": Fault(kernel(norm_values), "attention", "disagrees"),
    "heads paired wrongly": Fault(kernel(pair_heads_wrongly), "attention", "disagrees"),
    "scores scaled by head_dim": Fault(scale_scores_by_the_head, "attention", "scaled by 0.3536 instead of"),
    "layer left out": Fault(leave_a_layer_out, "wiring", "layer 3 is left out"),
    "norms as in llama": Fault(norm_as_llama_does, "wiring", "layer 0 is not x + norm(attention(norm(x)))"),
    "rows leak": Fault(look_at_other_rows, "batch_independence", "when other rows stand beside it"),
}
FAULTS = SEED_FAULTS | CLASSIC_FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, fault = fresh_model(), FAULTS[name]
    fault.plant(model, monkeypatch)
    verdict, sentence = CHECKS[fault.check](ModelUnderTest(model, tiny_tokenizer))
    assert verdict == "failed"
    assert fault.words in sentence


# A fault of one part need not be felt anywhere else; those that are must not be blamed on an innocent part.
ALONE = {
    "exact gelu": {"mlp"},
    "scores scaled by head_dim": {"attention"},
    "neighbours turned": {"rotary"},
    "factor on local layers": {"rotary"},
    "window - 1": {"window"},
    "embeddings not scaled": {"embedding"},
    "layer norm": {"norms"},
    "scaled head": {"head"},
    "padding in the loss": {"padding"},
}


def test_the_page_of_the_seeds_quirks_names_every_fault() -> None:
    page = (Path(__file__).parents[2] / "docs" / "seed-quirks.md").read_text(encoding="utf-8")
    for name, fault in SEED_FAULTS.items():
        assert f"| `{fault.check}` | `{name}` |" in page


def test_the_seeds_faults_are_found_together(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model()
    for plant in (stack_on_the_wrong_axis, skip_layers, norm_over_the_batch, see_the_prefix, count_padding):
        plant(model, monkeypatch)
    assert set(failures(ModelUnderTest(model, tiny_tokenizer))) >= {
        "causality",
        "rotary",
        "gradients",
        "qk_norm",
        "window",
        "padding",
    }


def test_a_model_that_raises_fails(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model()
    begin_with_the_global_layer(model, monkeypatch)
    found = failures(ModelUnderTest(model, tiny_tokenizer))
    assert "window" in found
    assert found["cache"].startswith("RuntimeError: The size of tensor")


@pytest.mark.parametrize("name", ALONE)
def test_fault_is_found_where_it_is(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = fresh_model()
    FAULTS[name].plant(model, monkeypatch)
    assert set(failures(ModelUnderTest(model, tiny_tokenizer))) == ALONE[name]


CORRECT: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no scaling": {"rope_scaling_factor": 1.0},
    "window of one": {"sliding_window": 1},
    "all local": {"sliding_window_pattern": 8},
    "all global": {"sliding_window_pattern": 1},
    "one key head": {"num_key_value_heads": 1},
    "other bases": {"rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "one pair": {"head_dim": 2},
    "short": {"max_position_embeddings": 8},
    "more rows than ids": {"vocab_size": 400},
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_model_passes(tiny_tokenizer: Tokenizer, name: str) -> None:
    assert failures(ModelUnderTest(fresh_model(**CORRECT[name]), tiny_tokenizer)) == {}


@pytest.mark.parametrize("kernel_name", KERNELS)
@pytest.mark.parametrize("damp", [False, True])
def test_initial_weights_pass(tiny_tokenizer: Tokenizer, kernel_name: str, damp: bool) -> None:
    model = Gemma3(tiny_config(vocab_size=380), kernel_name).eval()
    init_weights(model, seed=0, damp_branches=damp)
    assert {verdict for verdict, _ in run_checks(ModelUnderTest(model, tiny_tokenizer)).values()} == {"passed"}


def test_frozen_parameters_are_left_alone(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model().requires_grad_(False)
    verdicts = {name: verdict for name, (verdict, _) in run_checks(ModelUnderTest(model, tiny_tokenizer)).items()}
    assert verdicts["gradients"] == "skipped"
    assert "failed" not in verdicts.values()


def test_a_model_built_otherwise_is_examined_as_far_as_it_goes(tiny_tokenizer: Tokenizer) -> None:
    class Fused(nn.Module):
        """An attention that shows nothing of what it does."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.hidden_away = [inner]

        def forward(self, *arguments: Any) -> Tensor:
            return self.hidden_away[0](*arguments)

    model = fresh_model()
    for block in model.blocks:
        block.attention = Fused(block.attention)
    verdicts = {name: verdict for name, (verdict, _) in run_checks(ModelUnderTest(model, tiny_tokenizer)).items()}
    assert {name for name, verdict in verdicts.items() if verdict == "skipped"} == {
        "window", "rotary", "qk_norm", "attention",
    }  # fmt: skip
    assert "failed" not in verdicts.values()


def test_parts_that_are_never_called_are_not_judged(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused MLP and fused projections use their weights without calling them."""

    def fused(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    monkeypatch.setattr(nn.Linear, "__call__", fused)
    answers = run_checks(ModelUnderTest(fresh_model(), tiny_tokenizer))
    assert answers["mlp"] == ("skipped", "the forward pass calls no Linear")
    assert answers["qk_norm"][0] == "skipped"
    assert "failed" not in {verdict for verdict, _ in answers.values()}


def test_checks_leave_the_model_as_it_was(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kernels = [block.attention.kernel for block in model.blocks]
    run_checks(ModelUnderTest(model, tiny_tokenizer))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [block.attention.kernel for block in model.blocks] == kernels
    assert not any(module._forward_hooks for module in model.modules())
