"""Our logits are those of transformers: every shape, prompts within and beyond the window, padding, wild weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twin import MARKS, SHAPES, TOLERANCE, twin_of

from gemmule.model.attention import KERNELS
from gemmule.model.config import SIZES, Gemma3Config
from gemmule.model.gemma3 import Gemma3
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

pytestmark = MARKS

WINDOW = tiny_config().sliding_window


def assert_same_logits(model: Gemma3, *lengths: int) -> None:
    twin = twin_of(model)
    for length in lengths:
        tokens = some_tokens(model.config, length=length)
        with torch.no_grad():
            ours, theirs = model(tokens), twin(input_ids=tokens).logits
        assert 0.3 < theirs.std() < 3
        assert greatest_difference(ours, theirs) <= TOLERANCE, length


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_same_within_and_beyond_the_window(shape: str, kernel: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]), kernel)
    assert_same_logits(model, 1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW + 3)


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_made_narrow_are_the_same(size: str) -> None:
    """Their depth, heads, pattern, bases, scaling, and their ratio of scalar to head_dim."""
    scalar = 8 * int(SIZES[size]["query_pre_attn_scalar"]) // int(SIZES[size]["head_dim"])
    narrow = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8, "query_pre_attn_scalar": scalar,
        "sliding_window": WINDOW, "max_position_embeddings": 64,
    }  # fmt: skip
    model = lively_model(Gemma3Config.model_validate(SIZES[size] | narrow))
    assert {"local", "global"} <= set(model.config.layer_kinds)
    assert_same_logits(model, WINDOW - 1, 4 * WINDOW + 3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_of_262208_rows_is_the_same_up_to_its_last(tied: bool) -> None:
    model = lively_model(tiny_config(vocab_size=262_208, tie_word_embeddings=tied))
    tokens = torch.tensor([[2, 262_207, 262_144, 262_143, 0, 65_536, 131_072, 262_207, 1]])
    with torch.no_grad():
        ours, theirs = model(tokens), twin_of(model)(input_ids=tokens).logits
    assert ours.shape == (1, 9, 262_208)
    assert greatest_difference(ours, theirs) <= TOLERANCE


def test_norms_as_wild_as_googles_are_the_same() -> None:
    """Effective gains of exactly 0, below 0 and in the hundreds, as the real 270M has them."""
    model = lively_model(tiny_config())
    gains = torch.tensor([0.0, -3.0, 1.0, 40.0, 0.5, 300.0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.copy_(gains.repeat(4) - 1)
            elif "query_norm" in name or "key_norm" in name:
                parameter.copy_(torch.tensor([0.0, -1.5, 1.0, 3.0]).repeat(2) - 1)
    assert_same_logits(model, 4 * WINDOW + 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_the_same(side: str) -> None:
    model = lively_model(tiny_config())
    length, lengths = 23, torch.tensor([[23], [14], [WINDOW], [1]])
    tokens = some_tokens(model.config, rows=4, length=length)
    positions = torch.arange(length)[None] - (length - lengths if side == "left" else 0)
    real = (positions >= 0) & (positions < lengths)
    with torch.no_grad():
        ours = model(tokens, positions, torch.where(real, 0, -1))
        theirs = twin_of(model)(
            input_ids=tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0)
        ).logits
        alone = torch.cat([model(row[mask][None])[0] for row, mask in zip(tokens, real, strict=True)])
    assert greatest_difference(ours[real], theirs[real]) <= TOLERANCE
    assert greatest_difference(alone, theirs[real]) <= TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", ["both kinds of layer", "the real pattern", "untied"])
def test_logits_in_bf16_are_the_same_but_for_rounding(shape: str, kernel: str) -> None:
    """Root mean square: as near to what fp32 makes of the same weights as theirs, and as near to theirs."""
    model = lively_model(tiny_config(**SHAPES[shape]), kernel).bfloat16()
    twin, tokens = twin_of(model), some_tokens(model.config, rows=8, length=23)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(input_ids=tokens).logits.float()
        exact = model.float()(tokens)

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one - other).square().mean().sqrt().item()

    assert distance(exact, theirs) <= 0.03
    assert distance(ours, exact) <= 1.25 * distance(exact, theirs)
    assert distance(ours, theirs) <= 1.5 * distance(exact, theirs)


@pytest.mark.parametrize("width", [24, 640])
def test_scaled_embeddings_in_bf16_are_the_same_to_the_bit(width: int) -> None:
    """Logits in bf16 are too coarse to tell whether the scale was rounded before it was used."""
    model = lively_model(tiny_config(hidden_size=width, num_hidden_layers=1)).bfloat16()
    twin, tokens, entering = twin_of(model), some_tokens(model.config), []
    for first_layer in (model.blocks[0], twin.model.layers[0]):
        first_layer.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    with torch.no_grad():
        model(tokens)
        twin(input_ids=tokens)
    assert entering[0].dtype == torch.bfloat16
    assert torch.equal(*entering)


@st.composite
def configs(draw: st.DrawFn) -> Gemma3Config:
    """Any small Gemma 3 that transformers, too, accepts."""
    key_heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, head_dim = key_heads * queries, 2 * draw(st.integers(2, 8))
    return Gemma3Config(
        vocab_size=draw(st.integers(3, 99)),
        # In very few dimensions a branch can come out near nothing, and the norm after it enlarges its rounding.
        hidden_size=heads * draw(st.integers(-(-16 // heads), 64 // heads)),
        intermediate_size=draw(st.integers(16, 50)),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=draw(st.integers(1, 3 * head_dim)),
        sliding_window=draw(st.integers(1, 12)),
        sliding_window_pattern=draw(st.integers(1, 10)),
        rope_theta=draw(st.sampled_from([500.0, 10_000.0, 1_000_000.0])),
        rope_local_base_freq=draw(st.sampled_from([50.0, 10_000.0])),
        rope_scaling_factor=draw(st.sampled_from([1.0, 2.5, 8.0])),
        max_position_embeddings=64,
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(config=configs(), kernel=st.sampled_from(sorted(KERNELS)), length=st.integers(1, 30), seed=st.integers(0, 99))
def test_any_configuration_is_the_same(config: Gemma3Config, kernel: str, length: int, seed: int) -> None:
    model = lively_model(config, kernel, seed)
    tokens = some_tokens(config, length=length, seed=seed)
    with torch.no_grad():
        ours, theirs = model(tokens), twin_of(model)(input_ids=tokens).logits
    assert greatest_difference(ours, theirs) <= TOLERANCE * max(1.0, theirs.std().item())
