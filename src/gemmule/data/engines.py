"""Executors: run a function over work units on local processes or a Ray cluster, with the same results in order."""

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
    """Maps a picklable function over items in parallel, and calls `on_result` with each result."""

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], workers: int, on_result: Callable[[R], None]
    ) -> list[R]:
        """Return the results in the order of the items."""
        ...


def local(function: Callable[[T], R], items: Sequence[T], workers: int, on_result: Callable[[R], None]) -> list[R]:
    """Run in a pool of `workers` local processes; in this process where one suffices."""
    results = []
    if workers == 1 or len(items) <= 1:
        for item in items:
            results.append(function(item))
            on_result(results[-1])
        return results
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    liveness, alive = context.Pipe(duplex=False)
    has_started, started = context.Pipe(duplex=False)
    try:
        with (
            _defer_signals(alive.close),
            ProcessPoolExecutor(min(workers, len(items)), context, _init_worker, (liveness, started)) as pool,
        ):
            try:
                with _block_sigint():
                    # Not `pool.map`, which cancels what is left over; Python 3.11 then trips over it.
                    futures = [pool.submit(function, item) for item in items]
                for future in futures:
                    results.append(future.result())
                    on_result(results[-1])
            except BaseException:
                alive.close()  # the workers exit at once
                raise
    except BrokenProcessPool:
        raise DeviceError(_reason_of_failure(has_started.poll())) from None
    finally:
        for end in (alive, liveness, has_started, started):
            end.close()
    return results


def _reason_of_failure(has_started: bool) -> str:
    if has_started:
        return "a worker process was killed, perhaps for lack of memory; use fewer with --workers"
    return (
        "no worker process could start: each imports the main script, so a script that prepares data must do it below  "
        'if __name__ == "__main__":  (not needed with workers=1)'
    )


def end_worker_that_imports_a_script() -> None:
    """Exit where a spawned worker re-imports the main script, and that script prepares data at import.

    The parent process then reports the missing `if __name__ == "__main__":`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(1)


@contextmanager
def _defer_signals(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at once on SIGINT and SIGTERM, and run their handlers only at the end of the block.

    A handler that raises inside the pool's own code can leave a lock held, which deadlocks another thread.
    """
    received: list[tuple[int, FrameType | None]] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))
        act()

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # else it raises nothing
                before[number] = handler
                signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stop, frame in received[:1]:
            before[signal.Signals(stop)](stop, frame)


@contextmanager
def _block_sigint() -> Iterator[None]:
    """Block SIGINT in processes started here: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(liveness: Connection, started: Connection) -> None:
    """Initialize a worker process: it exits with its parent, however that ends, and tokenizes on one thread."""
    started.send_bytes(b"started")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(liveness,), daemon=True).start()


def _end_with_parent(liveness: Connection) -> None:
    try:
        liveness.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def ray(function: Callable[[T], R], items: Sequence[T], workers: int, on_result: Callable[[R], None]) -> list[R]:
    """Run on a Ray cluster: that of RAY_ADDRESS, or a local one of `workers` processes.

    All machines of the cluster must see the sources and the output folder under the same paths.
    """
    try:
        import ray as library
        import ray.data as ray_data
    except ImportError:
        raise MissingExtra("ray", "ray", "--engine ray") from None
    if not library.is_initialized():
        options = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        library.init(log_to_driver=False, logging_level="ERROR", **options)
    ray_data.DataContext.get_current().enable_progress_bars = False
    folder = Path.cwd()

    def work(row: dict[str, Any]) -> dict[str, Any]:
        os.chdir(folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            outcome: Any = function(pickle.loads(row["item"]))
        except (GemmuleError, OSError) as error:
            outcome = error
        return {"index": row["index"], "outcome": pickle.dumps(outcome)}

    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    results: dict[int, R] = {}
    for row in ray_data.from_items(rows, override_num_blocks=len(rows)).map(work).iter_rows():
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, Exception):
            raise outcome
        results[row["index"]] = outcome
        on_result(outcome)
    return [results[index] for index in range(len(items))]


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}


def available_cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
