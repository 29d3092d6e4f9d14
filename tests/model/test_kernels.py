"""Every kernel in KERNELS against the reference, and the reference against a loop written by hand."""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gemmule.model.attention import (
    KERNELS,
    LARGEST_BLOCK,
    AttentionMask,
    Kernel,
    block_local,
    block_size_for,
    flex,
    packed_mask,
    reference,
)
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from tiny import greatest_difference, tiny_config

SCALE = 12**-0.5
B, T, H = 2, 13, 8


class Scene(NamedTuple):
    """What a kernel is asked to do."""

    mask: AttentionMask
    heads: int = 4
    key_heads: int = 2


def positions(first: int, last: int) -> Tensor:
    return torch.arange(first, last + 1)[None]


def scene(window: int | None = None, causal: bool = False, documents: Tensor | None = None) -> AttentionMask:
    now = positions(0, T - 1)
    return AttentionMask(now, now, window, documents, documents, causal)


DOCUMENTS = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3, [5] * 1 + [6] * 12])
PADDED = positions(0, T - 1) - torch.tensor([[0], [6]])  # the second row begins with six pads
PADDING = torch.where(PADDED < 0, -1, 0)


def last(queries: int, keys: int, window: int | None, now: Tensor, documents: Tensor | None = None) -> AttentionMask:
    """Return what the last queries see of the last keys, as where a cache has kept those."""
    of_queries, of_keys = (None if documents is None else documents[:, -count:] for count in (queries, keys))
    return AttentionMask(now[:, -queries:], now[:, -keys:], window, of_queries, of_keys)


SCENES = {
    "causal, by promise": Scene(scene(causal=True)),
    "causal, by table": Scene(scene()),
    "window": Scene(scene(window=3)),
    "window of one": Scene(scene(window=1)),
    "window longer than the sequence": Scene(scene(window=50)),
    "documents": Scene(scene(documents=DOCUMENTS)),
    "documents and window": Scene(scene(window=3, documents=DOCUMENTS)),
    "left padding": Scene(scene(documents=PADDING)),
    "one key head": Scene(scene(causal=True), key_heads=1),
    "one key head and window": Scene(scene(window=3), key_heads=1),
    "as many key as query heads": Scene(scene(window=3), key_heads=4),
    "cached chunk": Scene(AttentionMask(positions(9, 12), positions(0, 12), None)),
    "cached chunk and window": Scene(AttentionMask(positions(9, 12), positions(7, 12), 3)),
    "cached token": Scene(AttentionMask(positions(12, 12), positions(0, 12), None)),
    "cached token and window": Scene(last(1, 3, 3, positions(0, T - 1))),
    "cached chunk longer than its window": Scene(last(7, 9, 3, positions(0, T - 1))),
    "cached chunk and documents": Scene(last(4, T, None, positions(0, T - 1), DOCUMENTS)),
    "cached chunk after left padding": Scene(last(4, T, None, PADDED, PADDING)),
    "cached chunk, padding and window, one key head": Scene(last(9, 11, 3, PADDED, PADDING), key_heads=1),
    "cached token after left padding": Scene(last(1, T, None, PADDED, PADDING), key_heads=1),
}


def inputs(case: Scene, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = case.mask.query_positions.shape[1], case.mask.key_positions.shape[1]
    shapes = (B, case.heads, queries, H), (B, case.key_heads, keys, H), (B, case.key_heads, keys, H)
    query, key, value = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """One number after the other: the softmax over the keys that the rule allows."""
    mixed = torch.zeros(query.shape)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        table = mask.dense().expand(query.shape[0], -1, -1, -1)[b, 0]
        for n in range(query.shape[1]):
            for t in range(query.shape[2]):
                seen = [s for s in range(key.shape[2]) if table[t, s]]
                scores = [math.exp(float(query[b, n, t] @ key[b, n // group, s]) * SCALE) for s in seen]
                for s, score in zip(seen, scores, strict=True):
                    mixed[b, n, t] += score / sum(scores) * value[b, n // group, s]
    return mixed


@pytest.mark.parametrize("name", SCENES)
def test_reference_is_the_softmax_over_visible_keys(name: str) -> None:
    query, key, value = (x.detach() for x in inputs(SCENES[name]))
    mixed = reference(query, key, value, SCENES[name].mask, SCALE, 0.0)
    assert greatest_difference(mixed, by_hand(query, key, value, SCENES[name].mask)) < 1e-5


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference(kernel: str, name: str) -> None:
    compare(KERNELS[kernel], SCENES[name].mask, SCENES[name])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS, PADDING])
@pytest.mark.parametrize("block", [1, 2, 4, 5, 13, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 6, 12])
def test_blocks_of_any_size_change_nothing(window: int, block: int, documents: Tensor | None, key_heads: int) -> None:
    now = PADDED if documents is PADDING else positions(0, T - 1)
    blocks = AttentionMask(now, now, window, documents, documents, block=block)
    compare(block_local, blocks, Scene(AttentionMask(now, now, window, documents, documents), key_heads=key_heads))


@pytest.mark.parametrize("documents", [None, DOCUMENTS, PADDING])
@pytest.mark.parametrize("window", [None, 3, 50])
def test_one_block_of_all_changes_nothing(window: int | None, documents: Tensor | None) -> None:
    now = PADDED if documents is PADDING else positions(0, T - 1)
    whole = AttentionMask(now, now, window, documents, documents, block=T)
    compare(block_local, whole, Scene(AttentionMask(now, now, window, documents, documents)))


@pytest.mark.parametrize("length", [13, 200])  # within a block of FlexAttention, and over several
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 150])
def test_flex_attention_sees_what_the_rule_allows(window: int | None, documents: bool, length: int) -> None:
    """Only there: FlexAttention knows no way back on a CPU (benchmarks/gpu.py compares its gradients on a GPU)."""
    now, generator = positions(0, length - 1), torch.Generator().manual_seed(0)
    marks = torch.randint(3, (B, length), generator=generator).sort().values if documents else None
    query, key, value = (torch.randn(B, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    seen = packed_mask("flex", now, window, marks)
    assert seen.sparse == (documents or (window is not None and window < length))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        mixed = flex(query, key, value, seen, SCALE, 0.0)
    expected = reference(query, key, value, AttentionMask(now, now, window, marks, marks), SCALE, 0.0)
    assert greatest_difference(mixed, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in its compiler
def test_compiled_blocks_take_flex_attention_whole() -> None:
    """One graph a layer, whatever the documents are; there alone, as above."""
    config = tiny_config(num_hidden_layers=2, sliding_window_pattern=2, head_dim=16, sliding_window=16)
    plain, blocks = Gemma3(config, "reference"), Gemma3(config, "flex")
    for model in (plain, blocks):
        init_weights(model, 0)
    for block in blocks.blocks:
        block.compile(fullgraph=True)
    tokens = torch.randint(config.vocab_size, (B, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for longest in (200, 70, 50):
            documents = (torch.arange(200) // longest).expand(B, -1).contiguous()
            mixed, expected = (model(tokens, documents=documents) for model in (blocks, plain))
            assert greatest_difference(mixed, expected) < 1e-5


def test_each_kernel_gets_its_form() -> None:
    now = positions(0, T - 1)
    assert packed_mask("sdpa", now, None, None).causal
    assert packed_mask("flex", now, T, None).causal
    assert packed_mask("block-local", now, None, None).block == T
    assert packed_mask("block-local", now, 4, DOCUMENTS).block == 2
    for plain in (packed_mask("sdpa", now, 4, None), packed_mask("reference", now, None, DOCUMENTS)):
        assert (plain.causal, plain.block, plain.sparse) == (False, None, False)


def test_blocks_are_half_a_window_or_a_short_row() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert block_size_for(256, 128, cpu) == 64
    assert block_size_for(256, 128, gpu) == 256
    assert block_size_for(2, 1, cpu) == 1
    for device in (cpu, gpu):
        assert block_size_for(2 * LARGEST_BLOCK, 128, device) == 64
        assert (
            block_size_for(LARGEST_BLOCK, None, device)
            == block_size_for(LARGEST_BLOCK, LARGEST_BLOCK, device)
            == LARGEST_BLOCK
        )
        assert block_size_for(LARGEST_BLOCK + 1, None, device) is None
        assert block_size_for(2 * LARGEST_BLOCK, 2 * LARGEST_BLOCK, device) is None


def test_blocks_keep_the_dtype_and_drop_weights() -> None:
    now = positions(0, T - 1)
    blocks, case = AttentionMask(now, now, 3, block=2), SCENES["window"]
    query, key, value = (x.detach().bfloat16() for x in inputs(case))
    mixed = block_local(query, key, value, blocks, SCALE, 0.0)
    assert mixed.dtype == torch.bfloat16
    exact = reference(query.float(), key.float(), value.float(), case.mask, SCALE, 0.0)
    assert greatest_difference(mixed.float(), exact) < 0.03
    torch.manual_seed(0)
    ones = torch.ones_like(value).float()
    kept = torch.stack([block_local(query.float(), key.float(), ones, blocks, SCALE, 0.5) for _ in range(200)])
    assert set(kept[:, :, :, 0].unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)


def compare(kernel: Kernel, mask: AttentionMask, case: Scene) -> None:
    """Compare a kernel with the reference: what comes out, and all gradients."""
    ours, theirs = inputs(case), inputs(case)
    mixed = kernel(*ours, mask, SCALE, 0.0)
    expected = reference(*theirs, case.mask, SCALE, 0.0)
    assert greatest_difference(mixed, expected) < 1e-5
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(9))
    (mixed * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert greatest_difference(one.grad, other.grad) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_keeps_the_dtype(kernel: str) -> None:
    case = SCENES["window"]
    query, key, value = (x.detach().bfloat16() for x in inputs(case))
    mixed = KERNELS[kernel](query, key, value, case.mask, SCALE, 0.0)
    assert mixed.dtype == torch.bfloat16
    exact = reference(query.float(), key.float(), value.float(), case.mask, SCALE, 0.0)
    assert greatest_difference(mixed.float(), exact) < 0.03


@pytest.mark.parametrize("name", ["causal, by promise", "window"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_weights_and_keeps_their_mean(kernel: str, name: str) -> None:
    """With values of one, an output is the sum of the weights that were kept, doubled."""
    case = SCENES[name]
    query, key, value = (x.detach() for x in inputs(case))
    torch.manual_seed(0)
    mixed = torch.stack([KERNELS[kernel](query, key, torch.ones_like(value), case.mask, SCALE, 0.5) for _ in range(50)])
    assert set(mixed[:, :, :, 0].unique().tolist()) == {0.0, 2.0}, "the first token sees one key, dropped or doubled"
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.02)
