import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.command import main
from runs import overrides

SMALL = overrides(
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.head_dim=8", "model.query_pre_attn_scalar=8",
    "model.intermediate_size=48", "model.sliding_window=8", "tokenizer.vocab_size=320", "train.batch_size=4",
    "train.context=32", "train.compile=false", "train.device=cpu", "train.precision=fp32",
)  # fmt: skip
QUICK = ["--trials", "1", "--steps", "2", "--warmup", "1"]


ROOT = Path(__file__).parents[2]


def measured(work: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{work}.py"), *map(str, arguments), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
def test_training_is_measured_and_written_down(tmp_path: Path) -> None:
    out = tmp_path / "results" / "train.json"
    found = measured("train", "--peer", "gemmule-muon", *SMALL, *QUICK, "--out", out)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert {"bench", "machine", "settings", "limit", "backends", "ratios"} == set(found)
    assert found["limit"]["measured"] > 0
    ours = found["backends"]["gemmule"]
    assert ours["steps_measured"] == 2
    assert ours["tokens_per_second"]["median"] > 0
    assert 0 < ours["share_of_limit"] < 1
    assert ours["peak_memory"] > 10 * 2**20
    assert ours["parameters"] == found["backends"]["gemmule-muon"]["parameters"]
    rates = [backend["tokens_per_second"]["median"] for backend in found["backends"].values()]
    assert found["ratios"]["gemmule-muon"]["median"] == pytest.approx(rates[0] / rates[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "peers", "figure"),
    [
        ("train", ["transformers"], "tokens_per_second"),
        ("engine", ["transformers", "llama.cpp"], "tokens_per_second"),
        ("load", ["transformers"], "seconds_to_first_token"),
        ("prepare", ["transformers"], "megabytes_per_second"),
    ],
)
def test_each_kind_of_work_is_compared(work: str, peers: list[str], figure: str) -> None:
    for library in ("transformers", "datasets", *(["llama_cpp", "gguf"] if len(peers) > 1 else [])):
        pytest.importorskip(library, reason=f"{library} is not installed")
    named = [word for peer in peers for word in ("--peer", peer)]
    options = {"prepare": ["--megabytes", "2", "--kills", "1"], "engine": [*SMALL, "--tokens", "4", "--rows", "3"]}
    found = measured(work, *named, *QUICK, *options.get(work, SMALL))
    assert found.get("killed_and_resumed_is_byte_identical", True)
    names = {"gemmule", *peers}
    if work == "engine":
        names, peers = {f"{name} x{rows}" for name in names for rows in (1, 3)}, [f"{peer} x3" for peer in peers]
    assert set(found["backends"]) == names
    assert set(found["ratios"]) == names - {"gemmule", "gemmule x3"}
    assert all(backend[figure]["median"] > 0 and backend["peak_memory"] > 0 for backend in found["backends"].values())
    assert all(found["backends"][peer]["versions"] for peer in peers)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--peer", "llama.cpp"], "--peer: invalid choice: 'llama.cpp' (choose from "),
        (["train", "--peer", "litgpt"], "pip install litgpt torch, then --litgpt-python"),
        (["train", "--peer", "gemmule-muon", "--peer", "gemmule-muon"], "name each once"),
        (["engine", "--precision", "int8", "--peer", "transformers"], "has no int8 on a CPU; leave it out"),
        (["engine", "--long", "-1"], "--long: -1 is not a finite number of at least 0"),
        (["load", "--peer", "litgpt"], "invalid choice: 'litgpt' (choose from "),
        (["train", "--set", "train.stpes=1"], "did you mean train.steps"),
        (["train", "--recipe", "nowhere.toml"], "no such file"),
        (["load", "--model", "nowhere"], "no such folder"),
        (["prepare", "--text", "nowhere.txt"], "--text nowhere.txt: cannot be read"),
        (["prepare", "--megabytes", "inf"], "--megabytes: inf is not a finite number of at least 0.1"),
        (["train", "--seconds", "nan"], "--seconds: nan is not a finite number of at least 0"),
        (["train", "--trials", "0"], "--trials: 0 is not a finite number of at least 1"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.delenv("LITGPT_PYTHON", raising=False)
    try:
        code = main(words[0], None, words[1:])
    except SystemExit as refusal:  # of argparse
        code = int(refusal.code or 0)
    assert code == 2
    assert sentence in capsys.readouterr().err
