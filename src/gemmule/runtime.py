"""The machine under the run: device, number format, the other processes, randomness, interrupts."""

import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from gemmule.errors import DeviceError, TrainingError

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
    if kind == "cuda" and device.index is None:
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))  # torchrun: one process for each
    if (device.index or 0) >= count:
        raise DeviceError(f"device {str(device)!r}: this machine has {count} of its kind, numbered from 0")
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


T = TypeVar("T")

# The longest that a process waits for the others within a step, and for the first one to prepare data or files.
_STEP, _PATIENCE = timedelta(minutes=10), timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """The processes of a run: as many as torchrun started, or one alone."""

    rank: int
    size: int
    # Of those on this machine.
    local_size: int
    # Of the group's collectives that carry numbers of a step.
    device: torch.device
    # By which processes wait for each other for long, and checkpoints are agreed on in the background.
    patient: dist.ProcessGroup | None
    # How often torchrun has started the processes of this machine again.
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Add up each value over all processes."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        figures: list[float] = together.tolist()
        return figures

    def agree(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]


ALONE = World(0, 1, 1, torch.device("cpu"), None)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; without it, be a world of one.

    TrainingError where another process of the run is lost on the way.
    """
    if dist.is_initialized():  # by a program that uses Gemmule as a library
        yield _world(device)
        return
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched:
        store, rank, size = next(iter(rendezvous("env://", timeout=_STEP)))
        dist.init_process_group(backend, store=_meet(store, rank, size), rank=rank, world_size=size, timeout=_STEP)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield _world(device)
    except BaseException as error:
        if not launched:
            raise
        failure = _lost_contact(error) or error
        get_error_handler().record_exception(failure)  # torchrun shows it in its summary
        raise failure from error
    finally:
        dist.destroy_process_group()


def _meet(store: Store, rank: int, size: int) -> Store:
    """Return a part of the store that belongs to the processes alive now.

    Those that torchrun starts again get the old store, and would look for each other where the dead ones listened. So
    each puts down a word that nobody used before, the first reads them out until each has heard its own.
    """
    mine = secrets.token_hex(8)
    store.set(f"word/{rank}", mine)
    end = time.monotonic() + _STEP.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            store.set("words", " ".join(store.get(f"word/{other}").decode() for other in range(size)))
        words = store.get("words").decode()
        place = hashlib.sha256(words.encode()).hexdigest()
        if mine in words.split():  # else they are words of the dead
            store.set(f"{place}/{rank}", "heard")
            if rank == 0 and store.check([f"{place}/{other}" for other in range(size)]):
                store.set(f"{place}/all", "heard")
            if store.check([f"{place}/all"]):
                return PrefixStore(place, store)
        time.sleep(0.02)
    raise TrainingError(f"process {rank}: the {size} processes of the run did not all come within {_STEP}")


def _world(device: torch.device) -> World:
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size())))
    here = device if device.type == "cuda" else torch.device("cpu")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local_size, here, patient, restarts)


def _lost_contact(error: BaseException) -> TrainingError | None:
    """Recognise what collectives raise when another process has gone."""
    words = ("closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "gloo")
    if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in words):
        return None
    reason = str(error).strip().splitlines()[0]
    return TrainingError(
        f"process {dist.get_rank()}: lost contact with another process of the run ({reason}); what that one printed "
        "says why; checkpoints are kept, the same command with --resume goes on"
    )


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may have a share."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # a second to load, which those who never shard save

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def autocast(device: torch.device, precision: Literal["bf16", "fp32"]) -> AbstractContextManager[None]:
    """Compute matrix products in bf16 inside the block, or change nothing for fp32; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def arriving(tensor: Tensor) -> Callable[[], Tensor]:
    """Send a tensor to the CPU; what is returned waits for it, but not for what a device is given to do after it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    sent = torch.cuda.current_stream().record_event()

    def wait() -> Tensor:
        sent.synchronize()
        return copy

    return wait


def reason_not_to_compile(device: torch.device) -> str | None:
    """Try torch.compile on something small; return what is in the way on this machine, or None."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # no C++ compiler, no triton, a system without either
        return str(error).splitlines()[0]
    return None


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules as they were written inside the block: for shapes that come only once."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled here; asking it to load takes a second
        return nullcontext()
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
        """Handle a signal: remember the first, leave at once at the second (torchrun passes each on, and its own)."""
        if self.requested and "TORCHELASTIC_RUN_ID" not in os.environ:
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
