import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from gemmule.data.engines import ENGINES, available_cores, local
from gemmule.errors import DeviceError, MissingExtra, SourceError


def ignore(_: object) -> None:
    pass


def square(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise SourceError("three: not a number that is read")
    time.sleep(0 if number < 3 else 600)
    return number


def miss(_: int) -> int:
    raise MissingExtra("tap", "water", "washing")


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def mark_and_wait(number: int, folder: Path) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(600 if number else 0)
    return number


def test_results_come_in_order_from_several_processes() -> None:
    told: list[tuple[int, int]] = []
    results = local(square, range(8), 2, told.append)
    assert [number for number, _ in results] == [number * number for number in range(8)]
    assert told == results
    assert os.getpid() not in {process for _, process in results}


def test_one_worker_is_this_process() -> None:
    assert {process for _, process in local(square, range(3), 1, ignore)} == {os.getpid()}


def test_an_error_arrives_as_it_was_and_the_other_workers_end_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match="three: not a number that is read"):
        local(fail_at_three, range(8), 2, ignore)
    assert time.monotonic() - began < 300  # not the sleep of the others
    with pytest.raises(MissingExtra, match=r"washing needs the library tap.*gemmule\[water\]"):
        local(miss, range(4), 2, ignore)


def test_a_worker_that_is_killed_is_explained() -> None:
    with pytest.raises(DeviceError, match=r"a worker process was killed.*--workers"):
        local(die, range(4), 2, ignore)


def test_workers_end_when_they_are_no_longer_wanted(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local(partial(mark_and_wait, folder=tmp_path), range(4), 2, interrupt)
    assert not any(Path(f"/proc/{file.name}").exists() for file in tmp_path.iterdir())


# Ctrl-C comes just when the wait for the second result has closed a lock that the pool needs too.
AT_THE_WORST_MOMENT = """
import os, signal, threading, time
from gemmule.data.engines import local

enter, armed = threading.Condition.__enter__, False

def strike(condition):
    entered = enter(condition)
    if armed and threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), signal.SIGINT)
    return entered

def arm(_):
    global armed
    armed = True

threading.Condition.__enter__ = strike
local(time.sleep, [0.0] + [0.1] * 30, 2, arm)
"""


def test_ctrl_c_ends_the_work_whenever_it_comes() -> None:
    process = subprocess.run([sys.executable, "-c", AT_THE_WORST_MOMENT], stderr=subprocess.PIPE, timeout=300)
    assert process.returncode == -signal.SIGINT
    assert process.stderr.rstrip().endswith(b"KeyboardInterrupt")


@pytest.mark.parametrize("ignored", [True, False])
def test_ctrl_c_is_left_to_whom_it_belonged(ignored: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        chosen = signal.getsignal(signal.SIGINT)
        local(square, range(2), 2, lambda _: os.kill(os.getpid(), signal.SIGINT) if ignored else None)
        assert signal.getsignal(signal.SIGINT) is chosen
    finally:
        signal.signal(signal.SIGINT, before)


def test_there_is_a_core() -> None:
    assert available_cores() >= 1


def test_the_engines_are_these() -> None:
    assert set(ENGINES) == {"local", "ray"}


SCRIPT = """
import sys
from pathlib import Path
from gemmule.data.settings import DataSettings
from gemmule.data import sources
from gemmule.data.prepare import prepare_dataset
from gemmule.tokenizer import TokenizerSettings

sources.UNIT = 2000
prepare_dataset(DataSettings(train=sys.argv[1]), TokenizerSettings(vocab_size=300), Path(sys.argv[2]), workers=2)
"""


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    text = "<|endoftext|>".join(f"This is story number {n} of {n * n}, told by {n % 7} foxes." for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "text.txt"), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "no worker process could start: each imports the main script" in ended.stderr
    assert 'if __name__ == "__main__":' in ended.stderr
    assert ended.stderr.count("Traceback") == 1, "the workers say nothing"


AT_SIGTERM = """
import os, signal, sys, time
from gemmule.data.engines import local

def stop(number, frame):
    sys.exit(7)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    local(time.sleep, [0.0] + [600.0] * 3, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
"""


def test_sigterm_ends_the_work_as_ctrl_c_does() -> None:
    process = subprocess.run([sys.executable, "-c", AT_SIGTERM], stderr=subprocess.PIPE, timeout=300, check=False)
    assert process.returncode == 7, process.stderr
