"""The model as a whole: what it may look at, what reaches it, and the constants that are easy to get wrong."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gemmule.model.attention import KERNELS
from gemmule.model.gemma3 import MLP, Gemma3, RMSNorm, all_logits, last_logits, rotary_tables, rotate
from tiny import LENGTH, greatest_difference, lively_model, some_tokens, tiny_config

DOCUMENTS = torch.tensor([0] * 4 + [1] * 6 + [2] * 3)


def logits_of_edits(model: Gemma3, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the logits of a text (1,T,V) and of it with token t replaced, for every t (T,T,V)."""
    text = some_tokens(model.config, rows=1)
    edited = text.repeat(LENGTH, 1)
    edited.diagonal().copy_((edited.diagonal() + 7) % model.config.vocab_size)
    with torch.no_grad():
        logits = model(torch.cat((text, edited)), documents=documents)
    return logits[:1], logits[1:]


def changes(model: Gemma3, documents: Tensor | None = None) -> Tensor:
    """Return, for every edited token (rows), by how much each position's logits change (columns), (T,T)."""
    whole, edited = logits_of_edits(model, documents)
    return (edited - whole).abs().amax(dim=-1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_editing_a_token_never_changes_logits_before_it(kernel: str) -> None:
    change = changes(lively_model(tiny_config(), kernel))
    assert change.tril(-1).max() < 1e-5
    assert change[torch.ones_like(change).triu().bool()].min() > 1e-3, "global layers carry it to all that follow"


@pytest.mark.parametrize("kernel", KERNELS)
def test_editing_a_token_changes_nothing_in_other_documents(kernel: str) -> None:
    documents = DOCUMENTS.expand(LENGTH + 1, -1)
    change = changes(lively_model(tiny_config(), kernel), documents)
    reached = (DOCUMENTS[:, None] == DOCUMENTS).triu()
    assert change[~reached].max() < 1e-5
    assert change[reached].min() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layers", "window"), [(1, 1), (1, 4), (2, 4)])
def test_local_layers_reach_exactly_the_window(kernel: str, layers: int, window: int) -> None:
    config = tiny_config(num_hidden_layers=layers, sliding_window=window, sliding_window_pattern=layers + 1)
    change = changes(lively_model(config, kernel))
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    reached = (distance >= 0) & (distance <= layers * (window - 1))
    assert change[~reached].max() < 1e-5
    assert change[reached].min() > 1e-4


@pytest.mark.parametrize("length", [1, 4, 5, 6, LENGTH])
def test_kernels_agree_on_the_whole_model(length: int) -> None:
    """Lengths around the window of 5, where the promise of plain causality begins and ends."""
    config = tiny_config()
    tokens = some_tokens(config, length=length)
    with torch.no_grad():
        one, other = (lively_model(config, kernel)(tokens) for kernel in ("reference", "sdpa"))
    assert one.std() > 0.3
    assert greatest_difference(one, other) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_parameter_gets_a_gradient(kernel: str, tied: bool) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=tied), kernel)
    tokens = some_tokens(model.config)
    functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-4, name


@pytest.mark.parametrize(
    ("width", "scale"), [(512, 22.625), (640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)]
)
def test_embedding_scale_is_rounded_to_bf16_and_leaves_the_head_alone(width: int, scale: float) -> None:
    config = tiny_config(hidden_size=width, num_hidden_layers=1, intermediate_size=1, vocab_size=3)
    model = lively_model(config).bfloat16()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        seen.append(vocabulary)
        return hidden

    model(torch.tensor([[0, 2]]), output_head=read)
    rows = model.embedding.weight[[0, 2]].float()
    assert torch.equal(seen[0][0], (rows * scale).bfloat16())
    if scale**2 != width:
        assert not torch.equal(seen[0][0], (rows * math.sqrt(width)).bfloat16())
    assert seen[1] is model.embedding.weight


def test_embedding_scale_is_exact_in_fp32() -> None:
    model = lively_model(tiny_config(num_hidden_layers=1))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tokens = some_tokens(model.config)
    model(tokens)
    torch.testing.assert_close(seen[0], model.embedding(tokens) * math.sqrt(24))


def test_norm_divides_by_the_root_mean_square_and_multiplies_by_one_plus_weight() -> None:
    norm = RMSNorm(2, eps=1e-6)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 1656.0]))  # gains as wild as in Google's weights: 0 and 1657
    expected = torch.tensor([0.0, 4.0 / math.sqrt(12.5) * 1657])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


def test_norm_of_nothing_is_nothing() -> None:
    assert RMSNorm(2, eps=1e-6)(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_norm_computes_in_fp32_and_answers_in_its_inputs_dtype() -> None:
    x = torch.tensor([3.0, 4.0, 300.0]).bfloat16()
    norm = RMSNorm(3, eps=1e-6)
    with torch.no_grad():
        norm.weight.fill_(0.001)  # 1 + w would be 1 in bf16
    exact = x.double() / x.double().square().mean().sqrt() * 1.001
    assert torch.equal(norm(x), exact.bfloat16())


def test_mlp_gates_with_the_tanh_form_of_gelu() -> None:
    mlp = MLP(tiny_config(hidden_size=4, intermediate_size=1))
    with torch.no_grad():
        for weight in mlp.parameters():
            weight.fill_(0.25)
    x = 2.0  # gate and up of four inputs of 2
    gelu = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert mlp(torch.full((1, 1, 4), 2.0))[0, 0, 0].item() == pytest.approx(0.25 * gelu * x, rel=1e-6)


def test_rotation_turns_halves_by_the_angle_of_their_pair() -> None:
    rotary = rotary_tables(torch.tensor([[3]]), head_dim=4, base=100.0, factor=1.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    fast, slow = 3.0, 3.0 * 100**-0.5
    expected = [
        1 * math.cos(fast) - 3 * math.sin(fast),
        2 * math.cos(slow) - 4 * math.sin(slow),
        3 * math.cos(fast) + 1 * math.sin(fast),
        4 * math.cos(slow) + 2 * math.sin(slow),
    ]
    assert rotate(x, rotary).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("position", [0, 257, 8190, 8191, 8192, 32_767])
def test_positions_stay_exact_beyond_8190(position: int) -> None:
    """In bf16 8190 and 8192 are one number, and 257 is 256."""
    cos, sin = rotary_tables(torch.tensor([[position]]), head_dim=8, base=1e4, factor=1.0)
    angles = [position * 1e4 ** -(i / 8) for i in (0, 2, 4, 6)] * 2
    assert cos.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-3)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-3)


def test_a_model_in_bf16_still_tells_8190_from_8192() -> None:
    model = lively_model(tiny_config()).bfloat16()
    tokens = some_tokens(model.config, length=2)
    with torch.no_grad():
        near, far = (model(tokens, torch.tensor([[8190, last]])) for last in (8191, 8192))
    assert greatest_difference(near, far) > 1e-2


def test_attention_knows_distances_not_places() -> None:
    model = lively_model(tiny_config())
    tokens, places = some_tokens(model.config), torch.arange(LENGTH)[None]
    with torch.no_grad():
        assert greatest_difference(model(tokens, places + 700), model(tokens)) < 2e-3
        assert greatest_difference(model(tokens, places * 2), model(tokens)) > 0.1


def test_scaling_factor_divides_the_positions_of_global_layers_alone() -> None:
    tokens, places = some_tokens(tiny_config()), torch.arange(LENGTH)[None]
    for pattern, stretches in ((1, True), (8, False)):
        scaled, plain = (
            lively_model(tiny_config(sliding_window_pattern=pattern, sliding_window=99, rope_scaling_factor=factor))
            for factor in (4.0, 1.0)
        )
        with torch.no_grad():
            stretched = greatest_difference(scaled(tokens, places * 4), plain(tokens, places)) < 1e-4
            unchanged = greatest_difference(scaled(tokens, places), plain(tokens, places)) < 1e-4
        assert (stretched, unchanged) == (stretches, not stretches)


def test_each_kind_of_layer_has_its_own_base() -> None:
    tokens = some_tokens(tiny_config())
    for pattern, change in ((1, "rope_theta"), (8, "rope_local_base_freq")):
        logits = [
            lively_model(tiny_config(sliding_window_pattern=pattern, **bases))(tokens).detach()
            for bases in ({}, {"rope_theta": 500.0}, {"rope_local_base_freq": 500.0})
        ]
        moved = [greatest_difference(logits[0], other) > 1e-3 for other in logits[1:]]
        assert moved == [change == "rope_theta", change == "rope_local_base_freq"]


def test_query_scalar_sets_the_sharpness_of_attention() -> None:
    """Scores are q k / sqrt(scalar): four times the scalar is half the gain of every query norm."""
    one, other = (lively_model(tiny_config(query_pre_attn_scalar=scalar)) for scalar in (12, 48))
    tokens = some_tokens(one.config)
    with torch.no_grad():
        assert greatest_difference(one(tokens), other(tokens)) > 1e-2
        for block in other.blocks:
            weight = block.get_parameter("attention.query_norm.weight")
            weight.copy_(2 * (1 + weight) - 1)
        assert greatest_difference(one(tokens), other(tokens)) < 1e-4


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    model = lively_model(tiny_config())
    tokens = some_tokens(model.config, rows=3)
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            assert greatest_difference(together[row : row + 1], model(tokens[row : row + 1])) < 1e-4


def test_positions_and_documents_by_default_are_one_text_from_the_start() -> None:
    model = lively_model(tiny_config())
    tokens = some_tokens(model.config)
    with torch.no_grad():
        given = model(tokens, torch.arange(LENGTH)[None], torch.zeros_like(tokens))
        assert greatest_difference(given, model(tokens)) < 1e-4


def test_readouts_are_the_logits_in_fp32() -> None:
    model = lively_model(tiny_config()).bfloat16()
    tokens = some_tokens(model.config)
    with torch.no_grad():
        every = model(tokens)
        last = model(tokens, output_head=last_logits)
    assert every.shape == (2, LENGTH, 48)
    assert last.shape == (2, 1, 48)
    assert every.dtype == last.dtype == torch.float32
    assert greatest_difference(every[:, -1:], last) < 1e-2
    assert torch.equal(all_logits(torch.eye(3)[None], torch.eye(3)), torch.eye(3)[None])


def test_untied_head_is_the_one_that_reads_out() -> None:
    model = lively_model(tiny_config(tie_word_embeddings=False))
    tokens = some_tokens(model.config)
    assert model.head is not None
    with torch.no_grad():
        before = model(tokens)
        model.head.weight.mul_(2)
        assert greatest_difference(model(tokens), 2 * before) < 1e-4


def test_dropout_acts_on_the_embedding_and_on_both_branches_of_every_layer() -> None:
    model = lively_model(tiny_config(dropout=0.3))
    places: list[torch.Size] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, x: places.append(x.shape))
    model(some_tokens(model.config))
    assert places == [(2, LENGTH, 24)] * (1 + 2 * 7)


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(setting: str) -> None:
    model, plain = lively_model(tiny_config(**{setting: 0.3})), lively_model(tiny_config())
    tokens = some_tokens(model.config)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
        model.train()
        torch.manual_seed(0)
        first, second = model(tokens), model(tokens)
        torch.manual_seed(0)
        again = model(tokens)
        assert torch.equal(plain.train()(tokens), plain.eval()(tokens)), "no dropout asked for, none in training"
    assert greatest_difference(first, second) > 0.1
    assert torch.equal(first, again), "the generator decides"
