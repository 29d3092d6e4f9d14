"""The same weights in transformers: everything that is ours must come out as theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gemmule.formats.folder import load_folder, save_folder, write_config
from gemmule.formats.names import foreign_names
from gemmule.model.attention import KERNELS
from gemmule.model.cache import Cache
from gemmule.model.config import SIZES, Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")
pytestmark = [
    pytest.mark.slow,
    # Deprecations between torch and transformers are theirs to settle.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "without scaling": {"rope_scaling_factor": 1.0},
    "scaling by 8": {"rope_scaling_factor": 8.0},
    "scalar of the head": {"query_pre_attn_scalar": 8},
    "other bases": {"rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "window of one": {"sliding_window": 1},
    "window longer than the text": {"sliding_window": 40},
    "all local": {"sliding_window_pattern": 8},
    "all global": {"sliding_window_pattern": 1},
    "one key head": {"num_key_value_heads": 1},
    "as many key as query heads": {"num_key_value_heads": 4},
    "odd epsilon": {"rms_norm_eps": 0.1},
}


def open_twin(model: Gemma3, tokenizer: Tokenizer, folder: Path) -> Any:
    """Save a model and let transformers open the folder, in fp32."""
    folder.mkdir(exist_ok=True)
    save_folder(model, tokenizer, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str, kernel: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]), kernel)
    twin = open_twin(model, tiny_tokenizer, tmp_path)
    tokens = some_tokens(model.config, length=23)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(input_ids=tokens).logits
    assert 0.3 < ours.std() < 3
    assert greatest_difference(ours, theirs) <= 1e-4


def test_logits_in_bf16_are_the_same_but_for_rounding(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config()).bfloat16()
    save_folder(model, tiny_tokenizer, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = some_tokens(model.config, length=23)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(input_ids=tokens).logits.float()
        exact = model.float()(tokens)
    assert greatest_difference(ours, theirs) <= 2 * greatest_difference(exact, theirs)
    assert greatest_difference(ours, theirs) <= 0.1


def test_left_padded_batch_is_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config())
    twin = open_twin(model, tiny_tokenizer, tmp_path)
    tokens, padding = some_tokens(model.config, length=23), torch.tensor([[0], [9]])
    positions = torch.arange(23)[None] - padding
    real = positions >= 0
    with torch.no_grad():
        ours = model(tokens, positions, torch.where(real, 0, -1))
        theirs = twin(input_ids=tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0)).logits
    assert greatest_difference(ours[real], theirs[real]) <= 1e-4


def test_cached_decoding_is_the_same_across_the_edge_of_the_window(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config())
    twin = open_twin(model, tiny_tokenizer, tmp_path)
    tokens, cache, memory = some_tokens(model.config, length=23), Cache(model.config), None
    with torch.no_grad():
        for chunk in tokens.split([3, 7, *[1] * 13], dim=1):
            answer = twin(input_ids=chunk, past_key_values=memory, use_cache=True)
            memory = answer.past_key_values
            assert greatest_difference(model(chunk, cache=cache), answer.logits) <= 1e-4


@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_three_steps_of_training_are_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str) -> None:
    """Loss and every gradient, over three steps of AdamW."""
    model = lively_model(tiny_config(**SHAPES[shape]))
    twin = open_twin(model, tiny_tokenizer, tmp_path)
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.01) for network in (model, twin)]
    names = list(foreign_names(model.config.num_hidden_layers, model.config.tie_word_embeddings))
    for step in range(3):
        # Their embedding gives id 0, the padding, no gradient; no text has it.
        tokens = some_tokens(model.config, length=23, seed=step).clamp(min=1)
        targets = tokens[:, 1:].flatten()
        ours = functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), targets)
        theirs = twin(input_ids=tokens, labels=tokens).loss
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
        for optimizer, loss in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for our_name, their_name in names:
            gradient, other = model.get_parameter(our_name).grad, twin.get_parameter(their_name).grad
            assert gradient is not None
            assert greatest_difference(gradient, other) <= 1e-4 * max(1.0, other.abs().max().item()), our_name
        for optimizer in optimizers:
            optimizer.step()


def test_what_transformers_saves_is_opened(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=False))
    twin = open_twin(model, tiny_tokenizer, tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer.save(tmp_path / "theirs")
    again, _ = load_folder(tmp_path / "theirs")
    tokens = some_tokens(model.config)
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_as_many_parameters(size: str) -> None:
    config = Gemma3Config.model_validate({"size": size})
    with torch.device("meta"):
        ours = Gemma3(config)
        theirs = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**write_config(config, None)))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def their_tokenizer(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_folder(lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size)), tiny_tokenizer, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["the ", " fox", "  ", "\n\n", "\t", "12", "\u2581", "\u2019", "e\u0301", "\U0001f984"])
).map("".join)


@settings(max_examples=200)
@given(text)
def test_tokenizer_encodes_and_decodes_the_same(tiny_tokenizer: Tokenizer, their_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert their_tokenizer.encode(text, split_special_tokens=True) == ids
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_encodes_sentences_the_same(tiny_tokenizer: Tokenizer, their_tokenizer: Any) -> None:
    assert their_tokenizer(SENTENCES).input_ids == [tiny_tokenizer.encode(sentence) for sentence in SENTENCES]
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (2, 1, 0)
