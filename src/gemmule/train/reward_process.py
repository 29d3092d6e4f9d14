"""A user's reward function in a process of its own, which may raise, print, hang or end.

`python -m gemmule.train.reward_process FILE FUNCTION SECONDS` is that process: a line of JSON for each call, both ways.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmule.errors import RecipeError
from gemmule.processes import python_module_command

_START_SECONDS = 60.0  # to import the file and what it imports


class RewardProcess:
    """Calls a function of a file in a child process; RecipeError where it fails, in one sentence."""

    def __init__(self, name: str, seconds: float) -> None:
        """Start the child for `file.py:function` and wait until the function is there."""
        file, _, function = name.rpartition(":")
        self._name, self._seconds = name, seconds
        self._child = subprocess.Popen(
            python_module_command("gemmule.train.reward_process", file, function, str(seconds)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        try:
            self._answer(None, _START_SECONDS)
        except BaseException:
            self.close()
            raise

    def __call__(self, messages: Sequence[Mapping[str, str]], reply: str, row: Mapping[str, Any]) -> Any:
        """Return what the function returns, read from JSON."""
        return self._answer([messages, reply, row], self._seconds)

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.communicate()

    def _answer(self, call: Any, seconds: float) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        late = threading.Timer(seconds, self._child.kill)
        late.start()
        line = b""
        try:
            if call is not None:
                self._child.stdin.write(json.dumps(call).encode() + b"\n")
            line = _read_line(self._child.stdout)
        except OSError:  # the child ended
            pass
        finally:
            finished = late.finished.is_set()
            late.cancel()
        if not line.endswith(b"\n"):
            code = self._child.wait()
            what = "starting" if call is None else "a call"
            reason = f"{what} took more than {seconds:g} s" if finished else f"its process ended with {code}"
            raise RecipeError(f"rewards.reward = {self._name}: {reason}; see rewards.call_seconds, and what it printed")
        answer = json.loads(line)
        if "error" in answer:
            raise RecipeError(f"rewards.reward = {self._name}: {answer['error']}")
        return answer["value"]


def _read_line(stream: Any) -> bytes:
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        part = stream.read(1 << 16)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _serve(file: str, name: str, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's, which ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints is no answer

    def send(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        function = _load(Path(file), name)
    except BaseException as error:
        send(error=_sentence(error))
        return
    send(value=None)
    for line in sys.stdin:
        # Where the run was killed meanwhile, nobody else would end a call that hangs.
        signal.alarm(math.ceil(seconds) + 5)
        try:
            value = function(*json.loads(line))
            send(value=_numbers(value))
        except BaseException as error:
            send(error=f"{name} raised {_sentence(error)}")
        signal.alarm(0)


def _load(file: Path, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no file {file}; write file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{file} has no function {name}")
    found: Callable[..., Any] = function
    return found


def _numbers(value: Any) -> Any:
    """Turn what a function returned into what JSON can hold; numbers of other libraries are floats."""
    if isinstance(value, Mapping):
        return {str(name): float(each) for name, each in value.items()}
    return float(value)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
