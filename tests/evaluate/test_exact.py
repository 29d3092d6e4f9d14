"""Models whose figures are known exactly."""

import math
from pathlib import Path

import pytest
import torch
from storybook_oracle import NEVER, Oracle, byte_tokenizer

from gemmule.data.settings import DataSettings
from gemmule.evaluate.text import score_text
from gemmule.storybook import stories
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def test_a_model_that_finds_all_bytes_equally_likely_needs_8_bits_per_byte(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    size = tokenizer.vocab_size
    model = lively_model(tiny_config(vocab_size=size, tie_word_embeddings=False, max_position_embeddings=300))
    with torch.no_grad():
        for name, weight in model.named_parameters():  # nothing is added to the embedding, the same for all tokens
            if "post_" in name:
                weight.fill_(-1)
        model.embedding.weight.fill_(1)
        model.norm.weight.zero_()
        assert model.head is not None
        model.head.weight.zero_()
        model.head.weight[256:] = NEVER / tiny_config().hidden_size
    texts = ["Ein Tag", "naïve ☃ " * 40, "a"]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    figures = score_text(model, tokenizer, DataSettings.model_validate({"train": str(tmp_path / "text.txt")})).figures()
    assert figures["bytes"] == sum(len(text.strip().encode()) for text in texts)
    assert figures["without_ends"]["bits_per_byte"] == pytest.approx(8, rel=1e-8)
    assert figures["without_ends"]["perplexity"] == pytest.approx(256, rel=1e-7)
    assert figures["ends"] == {"count": 3, "loss": pytest.approx(-NEVER, rel=1e-3)}, "which no end is among"
    assert figures["bits_per_byte"] > 8


def test_an_oracle_of_the_storybook_scores_its_floor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    told = list(stories(4, seed=7))
    (tmp_path / "told.txt").write_text("<|endoftext|>".join(story.text for story in told), encoding="utf-8")
    settings = DataSettings.model_validate({"train": str(tmp_path / "told.txt")})
    scores = score_text(Oracle(tokenizer), tokenizer, settings)  # type: ignore[arg-type]
    assert scores.nats.tolist() == pytest.approx([-story.log_probability for story in told], rel=1e-6)
    assert scores.end_nats.tolist() == pytest.approx([0.0] * 4, abs=1e-6), "an end is no surprise"
    floor = -sum(story.log_probability for story in told) / math.log(2) / sum(len(story.text) for story in told)
    assert scores.figures()["bits_per_byte"] == pytest.approx(floor, rel=1e-6)
