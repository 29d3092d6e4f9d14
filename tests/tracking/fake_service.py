"""The library trackio, as far as a tracker calls it; it is good or bad, as the environment variable FAKE says.

Tests copy it to `trackio.py` on the path of the process that sends. What arrives is in the file FAKE_ARRIVED.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KIND, ARRIVED = os.environ["FAKE"], Path(os.environ["FAKE_ARRIVED"])


def init(project: str, name: str, **_: Any) -> SimpleNamespace:
    if KIND == "refusing":
        raise ConnectionRefusedError(111, "Connection refused")
    if KIND == "silent":
        time.sleep(600)
    if KIND == "crashing":
        os.abort()
    lines = [json.loads(line) for line in ARRIVED.read_text().splitlines()] if ARRIVED.exists() else []
    steps = [line["step"] for line in lines if line["name"] == name]

    def log(metrics: dict[str, Any], step: int) -> None:
        if KIND == "slow":
            time.sleep(30)
        with ARRIVED.open("a") as file:
            file.write(json.dumps({"name": name, "step": step, **metrics}) + "\n")

    return SimpleNamespace(log=log, _next_step=max(steps, default=-1) + 1)


def finish() -> None:
    sys.stdout.write("finished\n")


def Markdown(text: str) -> str:  # noqa: N802 - the library's name
    return text


def Image(path: str) -> str:  # noqa: N802
    return Path(path).name
