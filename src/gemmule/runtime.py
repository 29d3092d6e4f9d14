"""The machine under the run: device, number format, randomness, interrupts."""

import hashlib
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Literal

import torch

from gemmule.errors import DeviceError

Precision = Literal["auto", "bf16", "fp32", "fp16"]


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
    if (device.index or 0) >= count:
        raise DeviceError(f"device {name!r}: this machine has {count} of its kind, numbered from 0")
    return device


def choose_precision(wanted: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return bf16 where the device computes fast in it, else fp32. DeviceError for fp16, which Gemma 3 overflows."""
    if wanted == "fp16":
        raise DeviceError(
            "train.precision = 'fp16': Gemma 3's residual stream and post-norms exceed fp16's largest number, 65504; "
            "use 'bf16' or 'fp32'"
        )
    if wanted != "auto":
        return wanted
    return "bf16" if _has_fast_bf16(device) else "fp32"


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # A CPU without these instructions emulates bf16, slower than fp32. The probes are private: absent means no.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def autocast(device: torch.device, precision: Literal["bf16", "fp32"]) -> AbstractContextManager[None]:
    """Compute matrix products in bf16 inside the block, or change nothing for fp32; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def reason_not_to_compile(device: torch.device) -> str | None:
    """Try torch.compile on something small; return what is in the way on this machine, or None."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # no C++ compiler, no triton, a system without either
        return str(error).splitlines()[0]
    return None


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules as they were written inside the block: for shapes that come only once."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def seed_everything(*key: int | str) -> None:
    """Seed torch's generators from a key such as (seed, step), so that dropout needs no state to be resumed."""
    torch.manual_seed(derive_seed(*key))


def derive_seed(*key: int | str) -> int:
    """Turn a key into 63 well-mixed bits, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Interrupt:
    """Whether the user asked to stop; `requested` turns true at the first Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: remember the first, leave at once at the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note Ctrl-C and SIGTERM instead of dying of them, so that the loop can finish its step and save."""
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, interrupt.note) for number in numbers]
    except ValueError:  # not in the main thread, where signals do not arrive
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
