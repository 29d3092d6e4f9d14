import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gemmule.errors import GemmuleError, SourceError
from gemmule.evaluate.explain import LONGEST, Explanation, as_json, compare, explain
from gemmule.evaluate.explain.recording import record
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES
from tiny import LENGTH, greatest_difference, lively_model, some_tokens, tiny_config

TEXT = "Mia found a red kite.\n\tThe owl \U0001f984 said: it is mine!"


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Gemma3:
    return lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size))


@pytest.fixture(scope="module")
def explanation(model: Gemma3, tiny_tokenizer: Tokenizer) -> Explanation:
    return explain(model, tiny_tokenizer, TEXT, "tiny")


def logits_of(model: Gemma3, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "block-local", "reference"])
def test_the_logit_lens_of_the_last_layer_is_the_models_logits_bit_for_bit(tied: bool, kernel: str) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=tied), kernel)
    ids = some_tokens(model.config, rows=1)[0].tolist()
    recording = record(model, ids)
    assert len(recording.hidden) == model.config.num_hidden_layers + 1
    assert torch.equal(recording.logits(model.config.num_hidden_layers), logits_of(model, ids))
    assert not torch.equal(recording.logits(model.config.num_hidden_layers - 1), logits_of(model, ids))


@settings(max_examples=30)
@given(
    length=st.integers(1, 24),
    window=st.integers(1, 30),
    pattern=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from(["sdpa", "block-local", "reference"]),
    seed=st.integers(0, 99),
)
def test_attention_of_each_row_sums_to_1_and_is_0_outside_the_window(
    length: int, window: int, pattern: int, groups: int, kernel: str, seed: int
) -> None:
    config = tiny_config(
        num_hidden_layers=3, sliding_window=window, sliding_window_pattern=pattern, num_key_value_heads=groups
    )
    seen: dict[int, Tensor] = {}
    tokens = some_tokens(config, rows=1, length=length, seed=seed)[0].tolist()
    record(lively_model(config, kernel, seed), tokens, seen.__setitem__)
    assert list(seen) == [0, 1, 2]
    places = torch.arange(length)
    back = places[:, None] - places
    for layer, weights in seen.items():
        is_global = (layer + 1) % pattern == 0
        visible = (back >= 0) if is_global else (back >= 0) & (back < window)
        assert weights.shape == (4, length, length)
        assert (weights[:, ~visible] == 0).all()
        assert (weights[:, visible] >= 0).all()
        assert greatest_difference(weights.sum(dim=-1), torch.ones(4, length)) < 1e-5


def test_attention_weights_are_those_that_mix_the_values(model: Gemma3) -> None:
    """Averaged by them, a layer's values are what goes into its output matrix."""
    kept: dict[str, Tensor] = {}
    block = model.blocks[2]
    block.attention.value.register_forward_hook(lambda _module, _given, result: kept.update(value=result[0]))  # type: ignore[union-attr]
    block.attention.output.register_forward_pre_hook(lambda _module, given: kept.update(mixed=given[0][0]))  # type: ignore[union-attr]
    weights: dict[int, Tensor] = {}
    record(model, some_tokens(model.config, rows=1)[0].tolist(), weights.__setitem__)
    values = kept["value"].view(LENGTH, 2, 8).repeat_interleave(2, dim=1)
    mixed = torch.einsum("nts,snh->tnh", weights[2], values).flatten(1)
    assert greatest_difference(mixed, kept["mixed"]) < 1e-5


def test_recording_changes_nothing_and_leaves_nothing_behind() -> None:
    model = lively_model(tiny_config(dropout=0.5, attention_dropout=0.5))
    ids = some_tokens(model.config, rows=1)[0].tolist()
    before, kernels = logits_of(model, ids), [block.attention.kernel for block in model.blocks]  # type: ignore[union-attr]
    model.train()

    def fail(layer: int, weights: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, ids, fail)
    assert model.training
    assert torch.equal(record(model, ids).logits(7), before), "without dropout"
    assert [block.attention.kernel for block in model.blocks] == kernels  # type: ignore[union-attr]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_surprise_ranks_and_alternatives_are_those_of_the_logits(
    model: Gemma3, tiny_tokenizer: Tokenizer, explanation: Explanation
) -> None:
    ids = tiny_tokenizer.encode(TEXT)
    logits = logits_of(model, ids)
    nats = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    first, *others = explanation.tokens
    assert [token.id for token in explanation.tokens] == ids
    assert (first.text, first.bytes, first.bits, first.rank, first.alternatives) == ("<bos>", 0, None, None, [])
    assert [token.bits for token in others] == pytest.approx((nats / math.log(2)).tolist(), rel=1e-5)
    for place, token in enumerate(others):
        order = logits[place].argsort(descending=True).tolist()
        assert token.rank is not None
        assert order[token.rank - 1] == token.id
        assert [each.id for each in token.alternatives] == order[:5]
        chances = logits[place].softmax(dim=-1)[order[:5]].tolist()
        assert [each.probability for each in token.alternatives] == pytest.approx(chances, rel=1e-5)
    assert [each.id for each in explanation.following] == logits[-1].argsort(descending=True)[:5].tolist()
    assert explanation.bits == pytest.approx(nats.sum().item() / math.log(2), rel=1e-6)
    assert explanation.bits_per_byte == pytest.approx(explanation.bits / len(TEXT.encode()))


def test_the_lens_ends_in_the_models_own_prediction(model: Gemma3, explanation: Explanation) -> None:
    assert [layer.layer for layer in explanation.lens] == list(range(7))
    assert [layer.kind for layer in explanation.lens] == list(model.config.layer_kinds)
    last = explanation.lens[-1]
    assert last.bits == pytest.approx([token.bits for token in explanation.tokens[1:]], abs=1e-4)
    likeliest = [token.alternatives[0].id for token in explanation.tokens[1:]] + [explanation.following[0].id]
    assert last.ids == likeliest
    assert explanation.lens[0].ids != likeliest


def test_a_model_that_finds_all_tokens_equally_likely_needs_the_logarithm_of_the_vocabulary(
    tiny_tokenizer: Tokenizer,
) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    model.embedding.weight.data.zero_()
    explanation = explain(model, tiny_tokenizer, TEXT)
    bits = {round(each, 4) for layer in explanation.lens for each in layer.bits}
    assert bits == {round(math.log2(380), 4)}
    assert explanation.bits_per_token == pytest.approx(math.log2(380))


def test_every_tensor_of_the_pass_is_measured(
    model: Gemma3, tiny_tokenizer: Tokenizer, explanation: Explanation
) -> None:
    length = len(tiny_tokenizer.encode(TEXT))
    tensors = {each.name: each for each in explanation.tensors}
    assert len(tensors) == len(explanation.tensors)
    assert tensors["blocks.3.attention.weights"].shape == (1, 4, length, length)
    assert (tensors["blocks.3.attention.weights"].min, tensors["blocks.3.attention.weights"].max) == (0, 1)
    assert tensors["blocks.0.mlp.gate"].shape == (1, length, 40)
    assert tensors["logits"].shape == (length, 380)
    parts = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Embedding)}
    assert parts <= tensors.keys()
    seen = model.embedding.weight[tiny_tokenizer.encode(TEXT)]
    measured = tensors["embedding"]
    expected = (seen.min().item(), seen.max().item(), seen.mean().item(), seen.square().mean().sqrt().item())
    assert measured[2:6] == pytest.approx(expected, rel=1e-5)
    assert measured.fp16_share == pytest.approx(seen.abs().max().item() / 65504)


def test_a_tensor_beyond_fp16_has_a_share_above_1(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    model.blocks[3].post_mlp_norm.weight.data.fill_(1e5)  # type: ignore[operator, union-attr]
    over = [each.name for each in explain(model, tiny_tokenizer, TEXT).tensors if each.fp16_share > 1]
    assert over[0] == "blocks.3.post_mlp_norm"
    assert "blocks.3" in over


def test_each_head_keeps_its_largest_weights(
    model: Gemma3, tiny_tokenizer: Tokenizer, explanation: Explanation
) -> None:
    seen: dict[int, Tensor] = {}
    record(model, tiny_tokenizer.encode(TEXT), seen.__setitem__)
    for layer in explanation.attention:
        assert layer.window == (None if layer.kind == "global" else 5)
        for head, weights in zip(layer.heads, seen[layer.layer], strict=True):
            for query, (keys, kept) in enumerate(zip(head.keys, head.weights, strict=True)):
                assert keys[0] == weights[query].argmax()
                assert kept == pytest.approx(weights[query, keys].tolist(), abs=6e-4)
            assert head.on_itself == pytest.approx(weights.diagonal()[1:].mean().item(), abs=1e-4)
            if layer.kind == "local":
                assert 0 <= head.distance < 5


def test_as_json_is_plain(explanation: Explanation) -> None:
    value = json.loads(json.dumps(as_json(explanation)))
    assert set(value) == set(Explanation._fields)
    assert value["tokens"][3]["alternatives"][0].keys() == {"id", "text", "probability"}
    assert value["attention"][0]["heads"][0].keys() >= {"keys", "weights", "distance"}


def test_a_byte_of_a_character_is_shown_in_hexadecimal(explanation: Explanation) -> None:
    texts = [token.text for token in explanation.tokens]
    assert "<0xF0>" in texts
    assert "".join(text for text in texts[1:] if "<0x" not in text) == TEXT.replace("\U0001f984", "")


def test_two_models_of_one_tokenizer_are_compared_token_by_token(
    tiny_tokenizer: Tokenizer, explanation: Explanation
) -> None:
    other = explain(lively_model(tiny_config(vocab_size=380), seed=1), tiny_tokenizer, TEXT)
    comparison = compare(explanation, other)
    assert comparison.same_tokenizer
    assert [span.text for span in comparison.spans] == [token.text for token in explanation.tokens]
    assert comparison.spans[0].one_bits is None
    assert (comparison.one_bits, comparison.other_bits) == pytest.approx((explanation.bits, other.bits))


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=40).map(" ".join(SENTENCES)[:30].__add__)


@settings(max_examples=20)
@given(text)
def test_two_tokenizers_are_compared_by_the_smallest_common_spans(
    tiny_tokenizer: Tokenizer, other_tokenizer: Tokenizer, model_of_380: Gemma3, model_of_300: Gemma3, text: str
) -> None:
    one, other = explain(model_of_380, tiny_tokenizer, text), explain(model_of_300, other_tokenizer, text)
    comparison = compare(one, other)
    assert not comparison.same_tokenizer
    ends = [set[int](), set[int]()]
    for own, explained in zip(ends, (one, other), strict=True):
        position = 0
        for token in explained.tokens:
            position += token.bytes
            own.add(position)
    assert len(comparison.spans) == len((ends[0] & ends[1]) - {0})
    assert (comparison.one_bits, comparison.other_bits) == pytest.approx((one.bits, other.bits))
    for side in ("one", "other"):
        ranges = [getattr(span, side) for span in comparison.spans]
        assert ranges[0][0] == 0
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert "".join(span.text for span in comparison.spans if "<0x" not in span.text) in text or "<0x" in str(comparison)


@pytest.fixture(scope="module")
def model_of_380() -> Gemma3:
    return lively_model(tiny_config(vocab_size=380, num_hidden_layers=1, max_position_embeddings=999))


@pytest.fixture(scope="module")
def model_of_300() -> Gemma3:
    return lively_model(tiny_config(vocab_size=300, num_hidden_layers=1, max_position_embeddings=999))


@pytest.fixture(scope="module")
def other_tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES, vocab_size=300)


def test_a_tokenizer_that_changes_the_text_leaves_the_totals_alone_to_be_compared(
    tiny_tokenizer: Tokenizer, explanation: Explanation
) -> None:
    lowering = Tokenizer(json.dumps(tiny_tokenizer.description | {"normalizer": {"type": "Lowercase"}}), {})
    other = explain(lively_model(tiny_config(vocab_size=380)), lowering, TEXT)
    assert other.bits_per_byte is None
    comparison = compare(explanation, other)
    assert (comparison.same_tokenizer, comparison.spans) == (False, [])
    assert (comparison.one_bits, comparison.other_bits) == (explanation.bits, other.bits)
    assert explain(lively_model(tiny_config(vocab_size=380)), lowering, TEXT.lower()).bits_per_byte is not None


def test_texts_that_cannot_be_explained_are_refused(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    with pytest.raises(SourceError, match="the text is empty"):
        explain(model, tiny_tokenizer, "")
    with pytest.raises(
        SourceError, match=r"the text has \d+ tokens, but the model reads at most 64 \(max_position_emb"
    ):
        explain(model, tiny_tokenizer, TEXT * 9)
    large = lively_model(tiny_config(vocab_size=380, max_position_embeddings=9999))
    with pytest.raises(SourceError, match=rf"but at most {LONGEST:,} are explained"):
        explain(large, tiny_tokenizer, TEXT * 99)


def test_a_model_that_computes_no_numbers_is_no_success(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    model.norm.weight.data[0] = math.nan
    with pytest.raises(GemmuleError, match="tiny: the loss is nan, not a number; gemmule doctor tiny says"):
        explain(model, tiny_tokenizer, TEXT, "tiny")
