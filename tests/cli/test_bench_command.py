import json
from pathlib import Path
from typing import Any

import pytest

from runs import gemmule, overrides

SMALL = overrides(
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.head_dim=8", "model.query_pre_attn_scalar=8",
    "model.intermediate_size=48", "model.sliding_window=8", "tokenizer.vocab_size=320", "train.batch_size=4",
    "train.context=32", "train.compile=false", "train.device=cpu", "train.precision=fp32",
)  # fmt: skip
QUICK = ["--rounds", "1", "--steps", "2", "--warmup", "1"]


def measured(*arguments: object) -> dict[str, Any]:
    ended = gemmule("bench", *arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_training_is_measured_and_written_down(tmp_path: Path) -> None:
    out = tmp_path / "results" / "train.json"
    found = measured("train", "--peer", "gemmule-muon", *SMALL, *QUICK, "--out", out)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert {"bench", "machine", "settings", "limit", "sides", "ratios"} == set(found)
    assert found["limit"]["measured"] > 0
    ours = found["sides"]["gemmule"]
    assert ours["steps_measured"] == 2
    assert ours["tokens_per_second"]["median"] > 0
    assert 0 < ours["share_of_limit"] < 1
    assert ours["peak_memory"] > 10 * 2**20
    assert ours["parameters"] == found["sides"]["gemmule-muon"]["parameters"]
    rates = [side["tokens_per_second"]["median"] for side in found["sides"].values()]
    assert found["ratios"]["gemmule-muon"]["median"] == pytest.approx(rates[0] / rates[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "peers", "figure"),
    [
        ("train", ["transformers"], "tokens_per_second"),
        ("generate", ["transformers", "llama.cpp", "llama.cpp-q8_0"], "tokens_per_second"),
        ("load", ["transformers"], "seconds_to_first_token"),
        ("prepare", ["transformers"], "megabytes_per_second"),
    ],
)
def test_each_kind_of_work_is_compared(work: str, peers: list[str], figure: str) -> None:
    for library in ("transformers", "datasets", *(["llama_cpp", "gguf"] if len(peers) > 1 else [])):
        pytest.importorskip(library, reason=f"{library} is not installed")
    named = [word for peer in peers for word in ("--peer", peer)]
    options = ["--megabytes", "2"] if work == "prepare" else ["--tokens", "4"]
    found = measured(work, *named, *SMALL, *QUICK, *options)
    assert set(found["sides"]) == {"gemmule", *peers}
    assert set(found["ratios"]) == set(peers)
    assert all(side[figure]["median"] > 0 and side["peak_memory"] > 0 for side in found["sides"].values())
    assert all(found["sides"][peer]["versions"] for peer in peers)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--peer", "llama.cpp"], "--peer llama.cpp: `bench train` compares with transformers, "),
        (["train", "--peer", "litgpt"], "pip install litgpt torch, then --litgpt-python"),
        (["train", "--peer", "gemmule-muon", "--peer", "gemmule-muon"], "name each once"),
        (["load", "--peer", "litgpt"], "`bench load` compares with transformers"),
        (["train", "--set", "train.stpes=1"], "did you mean train.steps"),
        (["train", "--recipe", "nowhere.toml"], "no such file"),
        (["load", "--model", "nowhere"], "no such folder"),
        (["prepare", "--text", "nowhere.txt"], "--text nowhere.txt: cannot be read"),
        (["fly"], ""),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str) -> None:
    monkeypatch.delenv("LITGPT_PYTHON", raising=False)
    ended = gemmule("bench", *words)
    assert ended.code == 2
    assert sentence in ended.err
