"""Child processes import nothing from a folder that somebody else filled; signals end a process wherever they come."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemmule.cli import main
from gemmule.evaluate.certificate import CertificateError, _ask
from gemmule.formats.k_quants import quantize
from gemmule.processes import prepare_process, python_module_command
from harness import resume
from harness.backends import Library, PeerError, check_library, gemmule_backend

PLANTED = "open('RAN', 'w').close()\n"
SOURCE = Path(__file__).parents[1] / "src" / "gemmule"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with files named like modules that child processes import."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemmule").mkdir()
    for name in ("gemmule/__init__", "gguf", "llama_cpp", "json", "multiprocessing", "numpy", "peer", "transformers"):
        (tmp_path / f"{name}.py").write_text(PLANTED)
    return tmp_path


def test_a_module_command_runs_the_installed_module(hostile: Path) -> None:
    command = python_module_command("gemmule", "--version")
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("gemmule 0.")
    assert not (hostile / "RAN").exists()


def test_the_certificate_asks_the_installed_runtime(hostile: Path) -> None:
    with pytest.raises(CertificateError, match="KeyError"):
        _ask("no runtime", hostile / "model", [1], [])
    assert not (hostile / "RAN").exists()


def test_other_children_are_started_in_the_same_way(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("gemmule.formats.k_quants.find_spec", lambda _: True)
    quantize(Path("whole.gguf"), Path("small.gguf"), "q4_k_m")
    resume._training(Path("recipe.toml"), Path("run"))
    started.append(gemmule_backend("gemmule", "train", {}).command)
    assert [command[:3] for command in started] == [[sys.executable, "-P", "-m"]] * 3


def test_only_one_place_makes_such_commands() -> None:
    users = {path.name for path in SOURCE.rglob("*.py") if 'sys.executable, "-' in path.read_text(encoding="utf-8")}
    assert users == {"processes.py"}


def test_a_peers_interpreter_is_asked_for_its_own_library(hostile: Path) -> None:
    with pytest.raises(PeerError, match="has no peer"):
        check_library(Library("peer", None, "a comparison"), sys.executable)
    assert not (hostile / "RAN").exists()


def test_multiprocessing_starts_no_file_of_the_current_directory(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr("atexit.register", lambda _: None)
    prepare_process()
    process = multiprocessing.get_context("spawn").Process(target=len, args=("",))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not (hostile / "RAN").exists()


LEAVES = """
import atexit, os, sys, threading, time
from gemmule.processes import exit_without_finalization

class Global:
    def __del__(self):
        sys.stderr.write("finalized\\n")

kept = Global()
atexit.register(sys.stdout.write, "exit function\\n")
threading.Thread(target=lambda: (time.sleep(0.3), sys.stdout.write("thread\\n"))).start()
exit_without_finalization(3)
"""


def test_a_process_can_end_without_the_interpreters_shutdown() -> None:
    """Threads are joined, exit functions run and output is flushed; the interpreter is not taken apart."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "thread\nexit function\n", "")


@pytest.mark.parametrize(("size", "codes"), [("1", []), ("2", [0])])
def test_ranks_of_a_run_end_in_that_way(size: str, codes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gloo thread that dropped its last tensor during the shutdown aborted one in twenty runs of two processes."""
    ended: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(sys, "argv", ["gemmule", "--version"])
    monkeypatch.setattr(main, "prepare_process", lambda: None)
    monkeypatch.setattr(main, "exit_without_finalization", ended.append)
    with pytest.raises(SystemExit):
        main.main()
    assert ended == codes


# A signal that comes while the garbage collector calls back: Python prints what it raises there, and goes on.
IGNORED = """
import signal, sys, time, weakref
from gemmule.processes import Terminated, terminated_as_interrupted

class Thing:
    pass

def callback(_):
    signal.raise_signal(signal.{name})

try:
    with terminated_as_interrupted():
        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
        print("ignored", flush=True)
        time.sleep(20)
except Terminated:
    print("terminated")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(("name", "said"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_signal_that_python_ignored_is_raised_again(name: str, said: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", IGNORED.format(name=name)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split() == ["ignored", said]
    assert "Exception ignored" not in done.stderr
    assert time.monotonic() - began < 15
