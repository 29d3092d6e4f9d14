"""What is to be run where a GPU can be had runs: here on a tiny shape and the CPU, on one where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / program), "--device", DEVICE, "--tiny", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_checks_and_measures(tmp_path: Path) -> None:
    parts = ["kernels", "losses", "training", "decoding", "profile"]
    said = run("gpu.py", "--out", tmp_path / "gpu.json", "--only", *parts)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(found) == ["limits", *(name for name in found if name in parts)]
    assert not [part for part in found.values() if "error" in part]
    assert found["kernels"]["wrong"] == found["losses"]["wrong"] == []
    timed = {"sdpa, adamw", "block-local, adamw", "block-local, adamw, dropout", "block-local, muon"} | (
        {"flex, adamw"} if DEVICE == "cuda" else set()
    )
    assert timed == set(found["training"])
    # A CPU without instructions for bf16 may compute small products faster than the large ones of the limit.
    most = 1.0 if DEVICE == "cuda" else float("inf")
    assert all(0 < figures["model_flops_utilisation"] < most for figures in found["training"].values())
    assert found["profile"]["kernels"]
    assert "decoding, compiled, 64 rows:" in said


@pytest.mark.slow
def test_a_part_without_time_is_left_out(tmp_path: Path) -> None:
    said = run("gpu.py", "--out", tmp_path / "gpu.json", "--only", "training", "--seconds", 3)
    assert "training: no time was left for it" in said


@pytest.mark.slow
def test_the_seeds_run_ends_with_its_curve(tmp_path: Path) -> None:
    sources = ("--train", "storybook:200", "--validation", "storybook:20")
    said = run("gpu_seed_run.py", *sources, "--out", tmp_path / "seed")
    result = json.loads((tmp_path / "seed/result.json").read_text())
    assert result["steps"] == 6
    assert result["best"]["val_loss"] > 0
    assert (tmp_path / "seed/run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation, best:" in said
