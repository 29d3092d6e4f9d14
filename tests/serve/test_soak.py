"""benchmarks/serve_soak.py for some seconds: clients that come, are cut, fall silent and read slowly."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import save_model

from gemmule.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
pytestmark = pytest.mark.slow


def soak(model: Path, folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "soak.json"
    command = [sys.executable, str(SCRIPT), str(model), "--log", str(folder / "log"), "--json", str(out)]
    command += ["--requests", "12", "--patience", "4", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert out.exists(), done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert "Traceback" not in (folder / "log").read_text(encoding="utf-8")
    assert found["wrong"] == 0, found["first_wrong"]
    assert found["exit_code"] == 0
    return found


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("chatty") / "chatty", tiny_tokenizer, context=2048)


def test_every_reply_is_right_and_nothing_is_left(chatty: Path, tmp_path: Path) -> None:
    found = soak(chatty, tmp_path, "--seconds", "12", "--streams", "32")
    assert found["rows_left"] == 0
    assert found["memory_grew"] < 0.05
    assert found["ended"]["reads: done"] > 50
    assert found["ended"]["cut: cut"] > 0


def test_sigterm_in_the_middle_cuts_nobody_without_a_word(chatty: Path, tmp_path: Path) -> None:
    found = soak(chatty, tmp_path, "--seconds", "8", "--streams", "32", "--kill")
    ends = {how.removeprefix("reads: ") for how in found["ended"] if how.startswith("reads: ")}
    # "closed" is a connection that came as the process ended, and got no byte: no reply had begun.
    assert ends <= {"done", "503", "unavailable", "closed"}, found["ended"]
