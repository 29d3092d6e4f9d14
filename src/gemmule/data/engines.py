"""Who works on units: the processes of this machine, or a Ray cluster. The results are the same, in the same order."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from gemmule.errors import DeviceError, GemmuleError, MissingExtra

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Calls a function that can be pickled on each item, at several at once; told of each result; returns all."""

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], workers: int, told: Callable[[R], None]
    ) -> list[R]:
        """Return the results in the order of the items."""
        ...


def local(function: Callable[[T], R], items: Sequence[T], workers: int, told: Callable[[R], None]) -> list[R]:
    """Work in so many processes of this machine; in this one where there is no more than one to do."""
    results = []
    if workers == 1 or len(items) == 1:
        for item in items:
            results.append(function(item))
            told(results[-1])
        return results
    context = multiprocessing.get_context("spawn")  # a copy of a process with threads, which fork makes, may hang
    watched, alive = context.Pipe(duplex=False)
    try:
        with (
            _at_ctrl_c(alive.close),
            ProcessPoolExecutor(min(workers, len(items)), context, _begin, (watched,)) as pool,
        ):
            try:
                with _deaf_to_ctrl_c():
                    # Not `pool.map`, which cancels what is left over; Python 3.11 then trips over it.
                    futures = [pool.submit(function, item) for item in items]
                for future in futures:
                    results.append(future.result())
                    told(results[-1])
            except BaseException:
                alive.close()  # and the workers end at once, whatever they are doing
                raise
    except BrokenProcessPool:
        sentence = "a worker process was killed, perhaps for want of memory; use fewer with --workers"
        raise DeviceError(sentence) from None
    finally:
        alive.close()
        watched.close()
    return results


@contextmanager
def _at_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Act at Ctrl-C at once, and raise KeyboardInterrupt only at the block's end.

    Raised amid the pool's own work, it can leave a lock closed that another thread then waits for without end.
    """
    heard = False

    def hear(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        act()

    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield  # where Ctrl-C raises nothing
        return
    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            raise KeyboardInterrupt


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Start processes that never hear Ctrl-C, as their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(watched: Connection) -> None:
    """Make a process a worker: one that ends with its parent, however that ends, and has one thread of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched: Connection) -> None:
    try:
        watched.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def ray(function: Callable[[T], R], items: Sequence[T], workers: int, told: Callable[[R], None]) -> list[R]:
    """Work on a Ray cluster: the one that RAY_ADDRESS names, or one of so many processes here.

    All machines of the cluster must see the sources and the folder that is written to under the same names.
    """
    try:
        import ray as library
        import ray.data as ray_data
    except ImportError:
        raise MissingExtra("ray", "ray", "--engine ray") from None
    if not library.is_initialized():
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        library.init(log_to_driver=False, logging_level="ERROR", **here)
    ray_data.DataContext.get_current().enable_progress_bars = False
    folder = Path.cwd()

    def work(row: dict[str, Any]) -> dict[str, Any]:
        os.chdir(folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            outcome: Any = function(pickle.loads(row["item"]))
        except (GemmuleError, OSError) as error:
            outcome = error
        return {"place": row["place"], "outcome": pickle.dumps(outcome)}

    rows = [{"place": place, "item": pickle.dumps(item)} for place, item in enumerate(items)]
    results: dict[int, R] = {}
    for row in ray_data.from_items(rows, override_num_blocks=len(rows)).map(work).iter_rows():
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, Exception):
            raise outcome
        results[row["place"]] = outcome
        told(outcome)
    return [results[place] for place in range(len(items))]


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
