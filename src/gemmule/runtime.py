"""What a run computes on: device, number format, random seeds, and the signals that stop it."""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Literal, NamedTuple

import torch

from gemmule.distributed import SINGLE_PROCESS, World, launch_environment
from gemmule.errors import DeviceError

Precision = Literal["auto", "bf16", "fp32", "fp16"]
NO_FP16 = "Gemma 3's residual stream and post-norms exceed fp16's largest number, 65504; use bf16 or fp32"


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is the first of cuda, mps, cpu that is there. DeviceError if it is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind = name.partition(":")[0]
    if not available.get(kind, False):
        here = ", ".join(kind for kind, there in available.items() if there)
        raise DeviceError(f"device {name!r}: this machine has no such device; it has {here}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: not a device's name; write {kind} or {kind}:0") from None
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and device.index is None:
        place = launch_environment()
        device = torch.device(kind, place.local_rank if place else 0)  # torchrun: one process for each
    if (device.index or 0) >= count:
        raise DeviceError(f"device {str(device)!r}: this machine has {count} of its kind, numbered from 0")
    return device


def choose_precision(wanted: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return the number format that is named; for "auto" bf16 on GPUs that have it, else fp32.

    Training on a CPU measures instead (`train/autotune.py`). DeviceError for fp16, which Gemma 3 overflows.
    """
    if wanted == "fp16":
        raise DeviceError(f"train.precision = 'fp16': {NO_FP16}")
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


def autocast(device: torch.device, precision: Literal["bf16", "fp32"]) -> AbstractContextManager[None]:
    """Compute matmuls in bf16 inside the block, or change nothing for fp32; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class Runtime(NamedTuple):
    """What a run computes on: its device, its number format and its ranks."""

    device: torch.device
    precision: Literal["bf16", "fp32"] = "fp32"
    world: World = SINGLE_PROCESS

    def autocast(self) -> AbstractContextManager[None]:
        """Compute matmuls of the block in this number format."""
        return autocast(self.device, self.precision)


def seed_everything(*key: int | str) -> None:
    """Seed torch's generators from a key such as (seed, step), so that dropout needs no state to be resumed."""
    torch.manual_seed(derive_seed(*key))


def derive_seed(*key: int | str) -> int:
    """Turn a key into 63 well-mixed bits, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Interrupt:
    """Whether a stop was asked for; `requested` turns true at the first signal."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: remember the first, leave at once at the second (torchrun passes each on, and its own)."""
        if self.requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.requested = True


# Ctrl-C; what systems and clusters send before they kill; a terminal that closes; what Slurm can send.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note signals that ask for a stop instead of dying of them, so that the loop can finish its step and save.

    One that is ignored, such as SIGHUP under nohup, stays ignored.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in STOPS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, interrupt.note)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number in heard:
            signal.signal(number, before[number])
