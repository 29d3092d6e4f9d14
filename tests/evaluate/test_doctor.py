"""Faults of a model's files, weights and config, each found by the check that is for it; a trained model passes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemmule.data.settings import DataSettings
from gemmule.errors import ModelError
from gemmule.evaluate.doctor import CHECKS, VARIANT_CHECKS, ModelUnderTest, examine, read_declared
from gemmule.evaluate.doctor.search import Gain, paired_gain
from gemmule.evaluate.doctor.text import token_losses, unigram_loss
from gemmule.evaluate.doctor.tokenizer import chat, special_tokens, vocabulary
from gemmule.evaluate.doctor.variants import Reading, applied, variants
from gemmule.evaluate.doctor.weights import activations, weights
from gemmule.formats.folder import save_folder
from gemmule.model.gemma3 import Gemma3, RMSNorm
from gemmule.model.init import init_weights
from gemmule.tokenizer import Tokenizer
from gemmule.train.loss import summed_loss
from sentences import SENTENCES
from tiny import lively_model, some_tokens, tiny_config


def fresh_model(**changes: Any) -> Gemma3:
    """Return a model with random weights of 7 layers and far positions."""
    return lively_model(tiny_config(**{"vocab_size": 380, "max_position_embeddings": 2048} | changes))


def failures(test: ModelUnderTest) -> dict[str, str]:
    """Return the checks of files and weights that fail, and why; the loss of random weights is not asked for."""
    answers = {check.__name__: check(test) for check in (weights, vocabulary, special_tokens, chat, activations)}
    return {name: sentence for name, (verdict, sentence) in answers.items() if verdict == "failed"}


# Weights.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_tokenizer: Tokenizer, value: float) -> None:
    model = fresh_model()
    model.get_parameter("blocks.1.mlp.up.weight").data.view(-1)[0] = value
    findings = examine(ModelUnderTest(model, tiny_tokenizer))
    assert findings[0] == ("weights", "failed", "blocks.1.mlp.up.weight holds NaN or infinity")
    assert {finding.verdict for finding in findings[5:]} == {"skipped"}


def test_a_matrix_that_was_never_filled_is_named(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    torch.nn.init.zeros_(model.blocks[2].attention.key.weight)
    assert failures(ModelUnderTest(model, tiny_tokenizer)) == {"weights": "blocks.2.attention.key.weight is all zeros"}


def test_an_overflow_is_found(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    for layer in (4, 5):
        torch.nn.init.constant_(model.blocks[layer].post_mlp_norm.weight, 3e38)
    assert "holds inf" in failures(ModelUnderTest(model, tiny_tokenizer))["activations"]


def test_what_fp16_cannot_hold_is_reported_and_no_failure(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    torch.nn.init.constant_(model.blocks[3].post_mlp_norm.weight, 1e5)
    test = ModelUnderTest(model, tiny_tokenizer)
    verdict, sentence = activations(test)
    assert verdict == "passed"
    assert "overflows in fp16" in sentence
    verdict, sentence = weights(test)
    assert verdict == "passed"
    assert "1e+05 (blocks.3.post_mlp_norm), far from 1" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_any_tensor_that_is_not_finite_is_named(tiny_tokenizer: Tokenizer, value: float) -> None:
    model = fresh_model(num_hidden_layers=3)
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.view(-1)[len(tensor) // 2] = value
        assert weights(ModelUnderTest(model, tiny_tokenizer)) == ("failed", f"{name} holds NaN or infinity")
        tensor.copy_(kept)
    assert failures(ModelUnderTest(model, tiny_tokenizer)) == {}


# Tokenizer and declarations.


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None], **config: Any) -> Tokenizer:
    """Return the tokenizer with its tokenizer.json changed."""
    document = json.loads(tokenizer._document)
    change(document)
    return Tokenizer(json.dumps(document), config)


def test_missing_bos_is_found(tiny_tokenizer: Tokenizer) -> None:
    silent = changed(tiny_tokenizer, lambda document: document.update(post_processor=None))
    assert "begins with 0 bos tokens" in failures(ModelUnderTest(fresh_model(), silent))["special_tokens"]


def test_doubled_bos_is_found(tiny_tokenizer: Tokenizer) -> None:
    double = changed(tiny_tokenizer, lambda document: document["post_processor"]["single"].insert(
        0, {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    ))  # fmt: skip
    assert "begins with 2 bos tokens" in failures(ModelUnderTest(fresh_model(), double))["special_tokens"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": "<bos>"}, "bos and eos are the same token, 2"),
        ({"pad_token": "<eos>"}, "pad and eos are the same token, 1"),
        ({"bos_token": "<nothing>"}, "the tokenizer has no bos token"),
        ({"eos_token": "<nothing>"}, "the tokenizer has no eos token"),
    ],
)
def test_confused_special_tokens_are_found(tiny_tokenizer: Tokenizer, config: dict[str, str], words: str) -> None:
    confused = changed(tiny_tokenizer, lambda _: None, **config)
    assert words in failures(ModelUnderTest(fresh_model(), confused))["special_tokens"]


@pytest.mark.parametrize(
    ("file", "declared", "words"),
    [
        ("config.json", {"eos_token_id": 3}, "config.json says eos_token_id = 3; the tokenizer's eos is 1"),
        ("config.json", {"text_config": {"bos_token_id": 1}}, "bos_token_id = 1; the tokenizer's bos is 2"),
        ("generation_config.json", {"eos_token_id": [1, 7]}, "eos_token_id = [1, 7]"),
        ("config.json", {"pad_token_id": 1}, "pad_token_id = 1"),
    ],
)
def test_ids_that_disagree_with_the_tokenizer_are_found(
    tiny_tokenizer: Tokenizer, file: str, declared: dict[str, Any], words: str
) -> None:
    assert words in failures(ModelUnderTest(fresh_model(), tiny_tokenizer, {file: declared}))["special_tokens"]


@pytest.mark.parametrize("ends", [1, [1], [1, 5], 5, [5]])
def test_turns_may_end_generation_too(tiny_tokenizer: Tokenizer, ends: Any) -> None:
    test = ModelUnderTest(fresh_model(), tiny_tokenizer, {"generation_config.json": {"eos_token_id": ends}})
    assert failures(test) == {}


def test_a_vocabulary_larger_than_the_model_is_found(tiny_tokenizer: Tokenizer) -> None:
    assert failures(ModelUnderTest(fresh_model(vocab_size=379), tiny_tokenizer)) == {
        "vocabulary": "the tokenizer makes ids up to 379, and the model has 379 rows"
    }


def test_a_special_token_without_a_row_is_no_failure(tiny_tokenizer: Tokenizer) -> None:
    image = {"id": 380, "content": "<image_soft_token>", "single_word": False, "lstrip": False, "rstrip": False}
    image |= {"normalized": False, "special": True}
    more = changed(tiny_tokenizer, lambda document: document["added_tokens"].append(image))
    assert more.vocab_size == 381
    assert failures(ModelUnderTest(fresh_model(), more)) == {}


def test_half_a_pair_of_turns_is_found(tiny_tokenizer: Tokenizer) -> None:
    half = Tokenizer(tiny_tokenizer._document.replace("<end_of_turn>", "<end>"), {})
    assert "has no <end_of_turn>" in failures(ModelUnderTest(fresh_model(), half))["chat"]


def test_a_vocabulary_without_turns_is_no_failure(tiny_tokenizer: Tokenizer) -> None:
    document = tiny_tokenizer._document.replace("<end_of_turn>", "<end>").replace("<start_of_turn>", "<start>")
    test = ModelUnderTest(fresh_model(), Tokenizer(document, {}))
    assert failures(test) == {}
    template = {"tokenizer_config.json": {"chat_template": "x"}}
    assert "there is a chat template" in failures(ModelUnderTest(test.model, test.tokenizer, template))["chat"]


def test_another_familys_template_is_found(tiny_tokenizer: Tokenizer) -> None:
    declared = {"chat_template.jinja": "{{ bos_token }}<|im_start|>user"}
    assert "not Gemma 3's" in failures(ModelUnderTest(fresh_model(), tiny_tokenizer, declared))["chat"]


def test_a_folder_that_we_write_declares_what_is_so(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = fresh_model()
    save_folder(model, tiny_tokenizer, tmp_path)
    declared = read_declared(tmp_path)
    assert set(declared) >= {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert failures(ModelUnderTest(model, tiny_tokenizer, declared)) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be read"):
        read_declared(tmp_path)


# Text.

_STEPS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """Text of the kind that `trained` knows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(SENTENCES[start : start + 3]) for start in range(0, 180, 6)))
    return DataSettings(train=str(path))


@pytest.fixture(scope="module")
def trained(tiny_tokenizer: Tokenizer) -> Gemma3:
    """A model that has learned the sentences in some seconds, with windows and rotary angles that matter to it."""
    shape = {"num_hidden_layers": 4, "rope_scaling_factor": 1.0, "max_position_embeddings": 2048, "sliding_window": 24}
    model = Gemma3(tiny_config(vocab_size=380, hidden_size=48, head_dim=16, query_pre_attn_scalar=16, **shape))
    init_weights(model, seed=0, damp_branches=True)
    texts = [" ".join(SENTENCES[start : start + 3]) for start in range(180)]
    rows = [ids for ids in tiny_tokenizer.encode_documents(texts) if len(ids) > 64]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, betas=(0.9, 0.95))
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1.0, (step + 1) / 10, (_STEPS - step) / (_STEPS / 2))
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        tokens = torch.tensor([rows[number][:65] for number in chosen])
        model(tokens[:, :-1], output_head=summed_loss(tokens[:, 1:].contiguous())).div(16 * 64).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def configured(model: Gemma3, **values: Any) -> Gemma3:
    """Return a copy of a model whose config is another."""
    other = Gemma3(model.config.replace(**values)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_trained_model_passes(trained: Gemma3, tiny_tokenizer: Tokenizer, data: DataSettings) -> None:
    """Each check is named while it runs."""
    seen: list[str] = []
    findings = examine(ModelUnderTest(trained.train(), tiny_tokenizer, data=data), lambda text, *_: seen.append(text))
    assert trained.training
    trained.eval()
    assert seen[:2] == ["checking weights", "checking vocabulary"]
    assert "trying sliding_window: 12" in seen
    assert [finding.name for finding in findings] == list(CHECKS)
    assert {finding.name: finding.sentence for finding in findings if finding.verdict == "failed"} == {}
    assert "better than a unigram model" in findings[5].sentence


def exchange(model: Gemma3) -> Gemma3:
    other = configured(model)
    for block in other.blocks:
        block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate
    return other


def add_one(model: Gemma3) -> Gemma3:
    other = configured(model)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, RMSNorm):
                module.weight.add_(1)
    return other


def scale_embedding(model: Gemma3) -> Gemma3:
    other = configured(model)
    with torch.no_grad():
        other.embedding.weight.mul_(model.config.hidden_size**0.5)
    return other


FAULTS: dict[str, tuple[Callable[[Gemma3], Gemma3], set[str]]] = {
    "gate and up exchanged": (exchange, {"gate_up"}),
    "window": (lambda model: configured(model, sliding_window=3), {"sliding_window"}),
    "local base": (lambda model: configured(model, rope_local_base_freq=1e6), {"rope_local_base_freq"}),
    "base and window": (
        lambda model: configured(model, rope_local_base_freq=1e6, sliding_window=3),
        {"rope_local_base_freq", "sliding_window"},
    ),
    "layer types": (lambda model: configured(model, sliding_window_pattern=4), {"layer_types"}),
    "norms hold 1 + w": (add_one, {"norms"}),
    "scaled embeddings": (scale_embedding, {"embedding_scale"}),
}


QUICK = ("gate and up exchanged", "base and window")  # the others take some seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_that_the_loss_shows_is_named(
    trained: Gemma3, tiny_tokenizer: Tokenizer, data: DataSettings, name: str
) -> None:
    fault, expected = FAULTS[name]
    findings = examine(ModelUnderTest(fault(trained), tiny_tokenizer, data=data))
    assert {finding.name for finding in findings if finding.verdict == "failed"} - {"loss"} == expected


def test_noise_fails(trained: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    """Without a text, too; nothing of the config is blamed."""
    model = configured(trained)
    init_weights(model, seed=3)
    findings = {finding.name: finding for finding in examine(ModelUnderTest(model, tiny_tokenizer))}
    assert [name for name, finding in findings.items() if finding.verdict == "failed"] == ["loss"]
    assert "the built-in English text" in findings["loss"].sentence
    assert "worse than a unigram model" in findings["loss"].sentence
    assert {findings[name].verdict for name in VARIANT_CHECKS} == {"skipped"}


def test_a_window_longer_than_the_text_is_not_testable(
    trained: Gemma3, tiny_tokenizer: Tokenizer, data: DataSettings
) -> None:
    model = configured(trained, sliding_window=8192)
    findings = {finding.name: finding for finding in examine(ModelUnderTest(model, tiny_tokenizer, data=data))}
    assert findings["sliding_window"].verdict == "skipped"
    assert "not testable with this text, whose longest piece has" in findings["sliding_window"].sentence


def test_a_key_that_no_layer_uses_is_skipped(trained: Gemma3, tiny_tokenizer: Tokenizer, data: DataSettings) -> None:
    model = configured(trained, sliding_window_pattern=1)
    findings = {finding.name: finding for finding in examine(ModelUnderTest(model, tiny_tokenizer, data=data))}
    assert findings["rope_local_base_freq"][1:] == ("skipped", "no layer of the model uses it")


# What the checks stand on.


def test_every_variant_leaves_the_model_as_it_was(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, tokens = model.config, some_tokens(model.config, length=40)
    logits = model(tokens)
    reading = Reading(config, bos=True)
    with applied(model, reading):
        assert torch.equal(model(tokens), logits)
    for variant in variants(config, adds_bos=True, has_bos=True):
        with applied(model, variant.change(reading)):
            changed = model(tokens)
        assert torch.equal(changed, logits) == (variant.names == ("bos",)), variant
    assert model.config is config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(tokens), logits)


def test_variants_are_what_their_names_say() -> None:
    model = fresh_model()
    tokens, reading = some_tokens(model.config, length=40), Reading(model.config, bos=True)
    for variant in variants(model.config, adds_bos=True, has_bos=False):
        [name, *more] = variant.names
        if not more and hasattr(model.config, name):
            value = type(getattr(model.config, name))(variant.value.replace(",", ""))
            other = configured(model, **{name: value})
            with applied(model, variant.change(reading)):
                assert torch.equal(model(tokens), other(tokens)), variant


def test_losses_are_those_of_each_piece_alone(tiny_tokenizer: Tokenizer) -> None:
    model = fresh_model()
    pieces = [some_tokens(model.config, rows=1, length=length)[0].tolist() for length in (9, 2, 17)]
    for bos in (True, False):
        losses = token_losses(model, 2, pieces, Reading(model.config, bos))
        for found, piece in zip(losses, pieces, strict=True):
            row = torch.tensor([[2] * bos + piece])
            logits = model(row[:, :-1]).log_softmax(-1)
            expected = -logits.gather(-1, row[:, 1:, None])[0, bos:, 0]
            assert found == pytest.approx(expected.detach().numpy(), rel=1e-4)


def test_the_unigram_model_leaves_out_the_token_that_it_predicts() -> None:
    # Of 5 tokens of 2 kinds, smoothed as by Witten and Bell, with 2 / 10 for each of 10 entries.
    probabilities = [(2 + 0.2) / 6, (1 + 0.2) / 6, (2 + 0.2) / 6]
    expected = -sum(map(math.log, probabilities)) / 3
    assert unigram_loss([[5, 5, 7], [7, 5]], 10) == pytest.approx(expected)


def test_the_gain_is_a_mean_with_the_error_of_chunks() -> None:
    draw = np.random.default_rng(0)
    one = [draw.normal(2, 1, size=320) for _ in range(30)]
    noise = [draw.normal(0.1, 1, size=320) for _ in range(30)]
    gain = paired_gain(one, [losses - more for losses, more in zip(one, noise, strict=True)])
    assert gain.mean == pytest.approx(np.concatenate(noise).mean())
    assert gain.error == pytest.approx(1 / math.sqrt(9600), rel=0.2)
    assert not Gain(0.004, 0.0001).is_clear, "less than the margin"
    assert not Gain(0.1, 0.05).is_clear, "by chance"
    assert Gain(0.1, 0.01).is_clear


def test_bf16_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"give it model\.float"):
        examine(ModelUnderTest(fresh_model().bfloat16(), tiny_tokenizer))
