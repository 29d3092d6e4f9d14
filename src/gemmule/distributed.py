"""The processes of a run: what a launcher says of them, how they find each other, and their collectives."""

import hashlib
import math
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from gemmule.errors import DeviceError, TrainingError

T = TypeVar("T")

# Timeouts of collectives within a step, and of waiting while the main process prepares data or writes files.
_STEP_TIMEOUT, _CONTROL_TIMEOUT = timedelta(minutes=10), timedelta(hours=24)
# Seconds of waiting at rendezvous after which a message says so.
_QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class World:
    """The processes of a run (ranks): as many as torchrun started, or a single one."""

    rank: int
    size: int
    # Number of processes on this machine.
    local_size: int
    # Device of the tensors in collectives of a step.
    device: torch.device
    # A gloo group with a long timeout, for waiting and for objects.
    control_group: dist.ProcessGroup | None
    # Another one, for checkpoints. They are written in a background thread, and collectives of two threads in one
    # group may begin in different orders on the ranks and wait for each other for ever.
    checkpoint_group: dist.ProcessGroup | None
    # How often torchrun has restarted the processes of this machine.
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        result: list[float] = sums.tolist()
        return result

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def barrier(self) -> None:
        """Wait, however long it takes, until every rank has come here."""
        self.broadcast(None)


SINGLE_PROCESS = World(0, 1, 1, torch.device("cpu"), None, None)


class Launch(NamedTuple):
    """This process's rank and where to rendezvous, from a launcher's environment variables."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    # How often torchrun has restarted the processes of this machine.
    restarts: int
    # The rendezvous endpoint, MASTER_ADDR:MASTER_PORT.
    address: str
    # Whether all ranks are on this machine, as far as the launcher says.
    one_machine: bool


def launch_environment(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Read the environment variables that a launcher such as torchrun sets; None where none are set.

    DeviceError where variables are missing or make no sense, since a process alone would train something else.
    """
    given = {
        name: value for name, value in (os.environ if environment is None else environment).items() if value.strip()
    }
    if "MASTER_ADDR" not in given and (given.get("RANK", "0"), given.get("WORLD_SIZE", "1")) == ("0", "1"):
        return None
    counts: dict[str, int] = {}
    for name, default in (
        ("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", given.get("WORLD_SIZE")),
        ("MASTER_PORT", None), ("TORCHELASTIC_RESTART_COUNT", "0"),
    ):  # fmt: skip
        text = given.get(name, default)
        if text is None or "MASTER_ADDR" not in given:
            missing = name if text is None else "MASTER_ADDR"
            there = ", ".join(f"{key}={given[key]}" for key in ("RANK", "WORLD_SIZE") if key in given)
            advice = "start the processes by torchrun, or unset what is set to train in one process"
            raise DeviceError(f"{missing} is not set, which a launcher sets beside {there}; {advice}")
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
            raise DeviceError(f"{name} = {text!r}: must be a whole number, as a launcher such as torchrun sets it")
        counts[name] = int(text)
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", None)):
        least, most = (0, counts[limit] - 1) if limit else (1, counts["WORLD_SIZE"])
        if not least <= counts[name] <= most:
            beside = f"{limit} = {counts[limit]}" if limit else f"WORLD_SIZE = {counts['WORLD_SIZE']}"
            raise DeviceError(f"{name} = {counts[name]}: must lie between {least} and {most}, with {beside}")
    rank, size, local_rank, local_size, port, restarts = counts.values()
    one_machine = "LOCAL_WORLD_SIZE" in given and local_size == size
    return Launch(rank, size, local_rank, local_size, restarts, f"{given['MASTER_ADDR']}:{port}", one_machine)


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Initialize the process group of the ranks that torchrun started; without a launcher, of this process alone.

    TrainingError where another rank is lost on the way.
    """
    launched = launch_environment()
    if dist.is_initialized():  # by a program that uses Gemmule as a library
        yield _world(device, launched)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched is None or launched.one_machine:
        # Objects from other ranks are unpickled: on one machine nobody else needs to reach the processes.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if launched is not None:
        store, rank, size = _rendezvous(launched)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_STEP_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield _world(device, launched)
    except BaseException as error:
        if launched is None:
            raise
        failure = _lost_contact(error) or error
        get_error_handler().record_exception(failure)  # torchrun shows it in its summary
        raise failure from error
    finally:
        dist.destroy_process_group()


def _rendezvous(launched: Launch) -> tuple[Store, int, int]:
    """Find the other ranks; return the store they share, this rank and the number of ranks.

    A message says so where that takes long. DeviceError where they cannot meet at that address. Torch waits in a
    thread, so that Ctrl-C and SIGTERM end the waiting.
    """
    results: SimpleQueue[tuple[Store, int, int] | Exception] = SimpleQueue()

    def meet() -> None:
        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=_STEP_TIMEOUT)))
            results.put((_store_of_live_ranks(store, rank, size), rank, size))
        except Exception as error:
            results.put(error)

    threading.Thread(target=meet, daemon=True).start()
    deadline = time.monotonic() + _QUIET_SECONDS
    while True:
        try:
            result = results.get(timeout=0.1)
        except Empty:
            if time.monotonic() > deadline:
                deadline = math.inf
                sys.stderr.write(
                    f"gemmule: rank {launched.rank} of {launched.size} waits for the others at {launched.address}\n"
                )
            continue
        if isinstance(result, RuntimeError | ValueError | OSError):
            reason = str(result).strip().partition("\n")[0]
            advice = "MASTER_ADDR and MASTER_PORT name a free port on the machine of rank 0, the same for all ranks"
            raise DeviceError(f"{launched.address}: the processes of the run cannot meet there ({reason}); {advice}")
        if isinstance(result, Exception):
            raise result
        return result


def _store_of_live_ranks(store: Store, rank: int, size: int) -> Store:
    """Return a key prefix of the store that belongs to the processes alive now.

    Processes that torchrun restarts get the old store, with the addresses of those that died. So each rank writes a
    fresh nonce, rank 0 publishes the list of nonces until every rank has found its own in it, and the hash of that
    list is the prefix.
    """
    nonce = secrets.token_hex(8)
    store.set(f"nonce/{rank}", nonce)
    end = time.monotonic() + _STEP_TIMEOUT.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            store.set("nonces", " ".join(store.get(f"nonce/{other}").decode() for other in range(size)))
        nonces = store.get("nonces").decode()
        prefix = hashlib.sha256(nonces.encode()).hexdigest()
        if nonce in nonces.split():  # else the list is of stale ranks
            store.set(f"{prefix}/{rank}", "found")
            if rank == 0 and store.check([f"{prefix}/{other}" for other in range(size)]):
                store.set(f"{prefix}/all", "found")
            if store.check([f"{prefix}/all"]):
                return PrefixStore(prefix, store)
        time.sleep(0.02)
    raise TrainingError(f"rank {rank}: the {size} processes of the run did not all arrive within {_STEP_TIMEOUT}")


def _world(device: torch.device, launched: Launch | None) -> World:
    control_group, checkpoint_group = (dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT) for _ in range(2))
    collective_device = device if device.type == "cuda" else torch.device("cpu")
    local_size, restarts = (launched.local_size, launched.restarts) if launched else (dist.get_world_size(), 0)
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, local_size, collective_device, control_group, checkpoint_group, restarts)


def _lost_contact(error: BaseException) -> TrainingError | None:
    """Recognize the errors of collectives whose peer has exited."""
    marks = ("closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "gloo")
    if not isinstance(error, RuntimeError) or not any(mark in str(error).lower() for mark in marks):
        return None
    reason = str(error).strip().splitlines()[0]
    return TrainingError(
        f"rank {dist.get_rank()}: lost contact with another process of the run ({reason}); its own output says why. "
        "Checkpoints are kept: the same command with --resume resumes the run"
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded over ranks (a DTensor); every rank must call it."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # takes a second to import; runs without sharding save it

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_to_cpu_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a device-to-host copy; the returned function waits for it, but not for kernels launched after it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
