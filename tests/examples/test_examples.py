"""Each example runs as its first lines say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gemmule.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in source] == []


@pytest.mark.slow
def test_train_by_hand_learns() -> None:
    lines = run_example("train_by_hand.py", 25)
    first, *_, last = (float(line.split()[3]) for line in lines if line.startswith("step"))
    assert last < first - 2
    assert any(line.startswith("Once upon a time") for line in lines)


def test_surprise_adds_up_to_the_tokens_of_the_text(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Mia found a red kite, number 0-7. The end."
    monkeypatch.setattr(sys, "argv", ["surprise.py", str(tiny_run), text])
    runpy.run_path(str(EXAMPLES / "surprise.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(Tokenizer.load(tiny_run / "model").encode(text)) - 1
    assert all(float(line.split()[0]) >= 0 for line in lines)
