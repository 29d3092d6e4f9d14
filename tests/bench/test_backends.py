import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gemmule.processes as processes_module
import harness.backends as backends_module
from gemmule.errors import GemmuleError, MissingExtra
from harness.backends import (
    BENCHMARKS,
    HERE,
    Backend,
    Library,
    PeerError,
    check_library,
    gemmule_backend,
    peer_backend,
    process_tree_memory,
    run_backend,
)

COUNTING = """
import time
def setup(job):
    block = bytearray(job["bytes"])
    for place in range(0, len(block), 1000):
        block[place] = 1
    print("a library prints something")
    return (lambda: 7.0), {"told": job["words"], "block": len(block)}
"""


def backend(program: str, folder: Path, job: dict[str, Any], **options: Any) -> Backend:
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    return Backend("counting", [sys.executable, str(HERE / "runner.py"), str(file)], job, **options)


def test_a_backend_is_timed_and_its_memory_is_its_own(tmp_path: Path) -> None:
    job = {"bytes": 60 * 2**20, "words": "a 'b'", "steps": 5, "seconds": 0, "warmup": 2}
    answer = run_backend(backend(COUNTING, tmp_path, job))
    assert answer["told"] == "a 'b'"
    assert answer["results"] == [7.0, 7.0]
    assert len(answer["seconds"]) == 5
    assert answer["began"] <= time.time()
    if sys.platform == "linux":
        assert 60 * 2**20 < answer["peak_memory"] < 120 * 2**20


def test_without_a_number_of_steps_seconds_are_filled_with_three_at_least(tmp_path: Path) -> None:
    sleeping = "import time\ndef setup(job):\n    return (lambda: time.sleep(0.01) or 1.0), {}\n"
    for seconds, least, most in ((0, 3, 3), (0.1, 4, 11)):
        answer = run_backend(backend(sleeping, tmp_path, {"steps": None, "seconds": seconds, "warmup": 1}))
        assert least <= len(answer["seconds"]) <= most


def test_of_several_ways_the_fastest_is_measured(tmp_path: Path) -> None:
    program = (
        "import time\ndef setup(job):\n"
        "    return {'slow': lambda: time.sleep(0.2) or 'slow', 'fast': lambda: 'fast'}, {'more': 1}\n"
    )
    answer = run_backend(backend(program, tmp_path, {"steps": 3, "seconds": 0, "warmup": 1}))
    assert (answer["chosen"], answer["results"], answer["more"]) == ("fast", ["fast"], 1)
    assert answer["tried"]["slow"] > 0.2 > answer["tried"]["fast"]


def test_threads_that_still_run_do_not_hold_up_the_end(tmp_path: Path) -> None:
    program = (
        "import threading, time\ndef setup(job):\n"
        "    threading.Thread(target=time.sleep, args=[600]).start()\n    return None, {}\n"
    )
    assert run_backend(backend(program, tmp_path, {}))["peak_memory"] != 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_family_counts_its_children(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys\ndef setup(job):\n"
        "    subprocess.run([sys.executable, '-c', 'import time; b = b\"1\" * (80 * 2**20); time.sleep(1)'])\n"
        "    return None, {}\n"
    )
    answer = run_backend(backend(parent, tmp_path, {}, process_tree=True))
    assert answer["peak_memory"] < 80 * 2**20 < answer["peak_memory_of_all"]
    assert process_tree_memory(os.getpid()) > 0


def test_a_backend_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(GemmuleError, match=r"counting ended with exit code 1: ValueError: no such thing"):
        run_backend(backend("def setup(job):\n    raise ValueError('no such thing')\n", tmp_path, {}))


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


def test_peers_do_not_import_the_modules_of_the_harness(tmp_path: Path) -> None:
    program = (
        "def setup(job):\n    import importlib.util as u\n"
        "    return None, {'found': [n for n in ('trials', 'harness') if u.find_spec(n)]}\n"
    )
    assert run_backend(backend(program, tmp_path, {}))["found"] == []
    assert peer_backend("x", "limits", {}).command[-1].endswith("limits.py")


def test_the_process_of_gemmule_finds_the_harness() -> None:
    backend = gemmule_backend("gemmule", "nothing", {})
    with pytest.raises(GemmuleError, match=r"No module named 'harness\.nothing'"):
        run_backend(backend)


def test_every_variable_that_the_command_sets_is_known_as_shared_or_ours() -> None:
    tree = ast.parse(Path(processes_module.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "os.environ" in ast.unparse(node.func)]
    names = {argument.value for call in calls for argument in call.args[:1] if isinstance(argument, ast.Constant)}
    shared = {"PYTHONSAFEPATH"}  # no matter of speed
    assert names - shared <= set(backends_module.OURS_ALONE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(
        "import pathlib, subprocess, sys, time\ndef setup(job):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"    pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n    time.sleep(60)\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(HERE / "runner.py"), str(tmp_path / "program.py")]
    parent = (
        "from harness.trials import run_trials\nfrom harness.backends import Backend\n"
        f"run_trials([Backend('slow', {command!r}, {{}})], 1, lambda *_: None)"
    )
    paths = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL, env=environment)
    end = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=120)
    child = int((tmp_path / "child").read_text())
    while _runs(child):
        assert time.monotonic() < end, "the child of the backend is still there"
        time.sleep(0.02)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{number}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
