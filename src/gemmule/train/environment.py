"""environment.jsonl: on what machine, with which versions and by which command a run was started and resumed."""

import json
import logging
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gemmule.data.engines import available_cores
from gemmule.files import reason_of
from gemmule.processes import physical_memory
from gemmule.run_folder import RunFolder
from gemmule.runtime import Runtime

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]


def log_environment(run: RunFolder, step: int, runtime: Runtime) -> None:
    """Append the environment of a process that trains from `step` on; a failure costs a warning."""
    try:
        with run.environment.open("a+b") as file:
            file.seek(max(0, run.environment.stat().st_size - 1))
            separator = b"" if file.read() in (b"", b"\n") else b"\n"  # after what a kill cut
            file.write(separator + json.dumps({"step": step, **environment(runtime)}).encode() + b"\n")
    except OSError as error:
        log.warning(f"{run.environment}: {reason_of(error)}; the run continues")


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return start time, versions, machine, devices, commit and command; what is unknown is None."""
    cuda = runtime.device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "gemmule": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": available_cores(),
        "memory": physical_memory(),
        "device": torch.cuda.get_device_name(runtime.device) if cuda else runtime.device.type,
        "processes": runtime.world.size,
        "commit": commit(),
        "command": _command(),
    }


def processor() -> str | None:
    """Return the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    if sys.platform == "darwin" and (name := _output("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    return platform.processor() or platform.machine() or None


def commit() -> str | None:
    """Return the git commit of the source tree that this package runs from, with `-dirty` where files were changed.

    None where the package is not run from its own checkout: an installed one may lie in somebody else's.
    """
    top = _output("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "gemmule" != PACKAGE:
        return None
    return _output("git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _version() -> str | None:
    try:
        return version("gemmule")
    except PackageNotFoundError:  # run from its source, not installed
        return None


def _command() -> str:
    name = Path(sys.argv[0]).name
    return shlex.join(["gemmule" if name == "__main__.py" else name, *sys.argv[1:]])


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
