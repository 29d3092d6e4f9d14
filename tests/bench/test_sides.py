import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gemmule.bench.sides as sides_module
import gemmule.cli.main as main_module
from gemmule.bench.sides import HERE, Library, Side, check_library, family_memory, peer_side, run_side
from gemmule.errors import GemmuleError, MissingExtra, PeerError

COUNTING = """
import time
def make(job):
    block = bytearray(job["bytes"])
    for place in range(0, len(block), 1000):
        block[place] = 1
    print("a library prints something")
    return (lambda: 7.0), {"told": job["words"], "block": len(block)}
"""


def side(program: str, folder: Path, job: dict[str, Any], **options: Any) -> Side:
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    return Side("counting", [sys.executable, str(HERE / "stage.py"), str(file)], job, **options)


def test_a_side_is_timed_and_its_memory_is_its_own(tmp_path: Path) -> None:
    job = {"bytes": 60 * 2**20, "words": "a 'b'", "steps": 5, "seconds": 0, "warmup": 2}
    answer = run_side(side(COUNTING, tmp_path, job))
    assert answer["told"] == "a 'b'"
    assert answer["results"] == [7.0, 7.0]
    assert len(answer["seconds"]) == 5
    assert answer["began"] <= time.time()
    if sys.platform == "linux":
        assert 60 * 2**20 < answer["peak_memory"] < 120 * 2**20


def test_without_a_number_of_steps_seconds_are_filled_with_three_at_least(tmp_path: Path) -> None:
    sleeping = "import time\ndef make(job):\n    return (lambda: time.sleep(0.01) or 1.0), {}\n"
    for seconds, least, most in ((0, 3, 3), (0.1, 4, 11)):
        answer = run_side(side(sleeping, tmp_path, {"steps": None, "seconds": seconds, "warmup": 1}))
        assert least <= len(answer["seconds"]) <= most


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_family_counts_its_children(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys\ndef make(job):\n"
        "    subprocess.run([sys.executable, '-c', 'import time; b = b\"1\" * (80 * 2**20); time.sleep(1)'])\n"
        "    return None, {}\n"
    )
    answer = run_side(side(parent, tmp_path, {}, family=True))
    assert answer["peak_memory"] < 80 * 2**20 < answer["peak_memory_of_all"]
    assert family_memory(os.getpid()) > 0


def test_a_side_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(GemmuleError, match=r"counting ended with exit code 1: ValueError: no such thing"):
        run_side(side("def make(job):\n    raise ValueError('no such thing')\n", tmp_path, {}))


def test_what_is_missing_is_said_with_how_to_install_it() -> None:
    with pytest.raises(MissingExtra, match=r"comparing needs the library nothing_like_it.*gemmule\[parity\]"):
        check_library(Library("nothing_like_it", "parity", "comparing"), None)
    litgpt = Library("litgpt", None, "comparing with litgpt")
    with pytest.raises(PeerError, match=r"pip install litgpt torch, then --litgpt-python peer/bin/python"):
        check_library(litgpt, None)
    with pytest.raises(PeerError, match="--litgpt-python no/python: cannot be run"):
        check_library(litgpt, "no/python")
    with pytest.raises(PeerError, match="has no litgpt_that_nobody_has"):
        check_library(Library("litgpt_that_nobody_has", None, "comparing"), sys.executable)


def test_peers_do_not_see_the_files_beside_the_stage(tmp_path: Path) -> None:
    program = (
        "def make(job):\n    import importlib.util as u\n    return None, {'found': bool(u.find_spec('rounds'))}\n"
    )
    assert run_side(side(program, tmp_path, {}))["found"] is False
    assert peer_side("x", "limits", {}).command[-1].endswith("limits.py")


def test_every_variable_that_the_command_sets_is_known_as_shared_or_ours() -> None:
    tree = ast.parse(Path(main_module.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "os.environ" in ast.unparse(node.func)]
    names = {argument.value for call in calls for argument in call.args[:1] if isinstance(argument, ast.Constant)}
    assert names <= set(sides_module.OURS_ALONE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(
        "import pathlib, subprocess, sys, time\ndef make(job):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"    pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n    time.sleep(60)\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(HERE / "stage.py"), str(tmp_path / "program.py")]
    parent = (
        "from gemmule.bench.rounds import run_rounds\nfrom gemmule.bench.sides import Side\n"
        f"run_rounds([Side('slow', {command!r}, {{}})], 1, lambda *_: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=30)
    child = int((tmp_path / "child").read_text())
    while _runs(child):
        assert time.monotonic() < end, "the child of the side is still there"
        time.sleep(0.02)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{number}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
