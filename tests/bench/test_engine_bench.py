"""The benchmark of the engine: the same work in every backend, and what its figures mean."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmule.formats.folder import save_folder
from gemmule.formats.gguf import save_gguf
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from harness.backends import peer_backend, run_backend
from harness.engine import PEERS, PROMPT_TOKENS, prompts_of, setup, summary
from harness.trials import Budget
from tiny import lively_model, tiny_config

ROWS, TOKENS = 3, 12


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Gemma3:
    return lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size))


@pytest.fixture(scope="module")
def job(model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine") / "hf"
    folder.mkdir()
    save_folder(model, tiny_tokenizer, folder, torch.float32)
    return {
        "model": str(folder),
        "prompts": prompts_of(tiny_tokenizer, ROWS),
        "precision": "fp32",
        "decoding": "auto",
        "device": "cpu",
        "tokens": TOKENS,
        **Budget(1, 0.0, 1, 1)._asdict(),
    }


def greedy(model: Gemma3, prompt: list[int]) -> list[int]:
    """Return the likeliest tokens by a full forward pass for each."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_every_prompt_is_continued_greedily(job: dict[str, Any], model: Gemma3) -> None:
    assert [len(prompt) for prompt in job["prompts"]] == [PROMPT_TOKENS] * ROWS
    step, _ = setup(job)
    assert step is not None
    assert step() == step() == [greedy(model, prompt) for prompt in job["prompts"]]


def test_rates_count_all_rows_and_ratios_are_those_of_our_many() -> None:
    job = {"prompts": [[1], [2]], "tokens": 10}
    alone = {"results": [[[1, 2]]], "seconds": [0.5, 1.0, 1.5], "peak_memory": 1}
    ours = {"results": [[[1, 2], [3, 4]]], "seconds": [1.0], "peak_memory": 2}
    peer = {"results": [[[1, 2], [3, 5]]], "seconds": [4.0], "peak_memory": 3}
    peer |= {"chosen": "b", "tried": {"a": 8.0, "b": 4.0}}
    found = summary(job, {"gemmule x1": [alone], "gemmule x2": [ours], "peer x2": [peer]})
    backends = found["backends"]
    assert [backends[name]["tokens_per_second"]["median"] for name in backends] == [10, 20, 5]
    assert [backends[name]["same_replies"] for name in backends] == ["1 of 1", "2 of 2", "1 of 2"]
    assert {name: ratio["median"] for name, ratio in found["ratios"].items()} == {"gemmule x1": 2, "peer x2": 4}
    assert backends["peer x2"]["chosen"] == ["b"]
    assert backends["peer x2"]["tried"] == {"a": 2, "b": 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_peer_draws_the_same_tokens(
    name: str, rows: int, job: dict[str, Any], model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    peer = PEERS[name]
    if find_spec(peer.library.module) is None:
        pytest.skip(f"{peer.library.module} is not installed")
    changed = job | {"prompts": job["prompts"][:rows], "gguf": str(tmp_path / "model.gguf")}
    if peer.gguf is not None:
        save_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "f32")
    found = run_backend(peer_backend(name, peer.program, changed))
    assert found["results"] == [[greedy(model, prompt) for prompt in changed["prompts"]]]
    assert len(found["tried"]) > 1
