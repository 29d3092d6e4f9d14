import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from gemmule.distributed import _store_of_live_ranks, launch_environment
from gemmule.errors import DeviceError
from gemmule.runtime import (
    Interrupt,
    autocast,
    choose_device,
    choose_precision,
    derive_seed,
    interruptible,
    seed_everything,
)

CPU = torch.device("cpu")


def machine_with(monkeypatch: pytest.MonkeyPatch, *, gpus: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "chosen"), [(2, False, "cuda"), (0, True, "mps"), (1, True, "cuda"), (0, False, "cpu")]
)
def test_auto_takes_the_fastest_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, chosen: str
) -> None:
    machine_with(monkeypatch, gpus=gpus, mps=mps)
    assert choose_device("auto").type == chosen


def test_a_named_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, gpus=2)
    assert choose_device("cpu") == CPU
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu", "", "gpu:0", "CPU"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine_with(monkeypatch, gpus=0)
    with pytest.raises(DeviceError, match=rf"device '{name}': this machine has no such device; it has cpu$"):
        choose_device(name)


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, gpus=2)
    with pytest.raises(DeviceError, match=r"device 'cuda:2': this machine has 2 of its kind, numbered from 0"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "cuda:-1", "cuda:0:1"])
def test_a_device_that_is_misspelt_is_named_with_what_would_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine_with(monkeypatch, gpus=2)
    with pytest.raises(DeviceError, match=rf"device '{name}': not a device's name; write cuda or cuda:0"):
        choose_device(name)


def test_fp16_is_refused_with_the_reason() -> None:
    with pytest.raises(DeviceError, match=r"train\.precision = 'fp16': .* exceed fp16's largest number, 65504; use"):
        choose_precision("fp16", CPU)


def test_precision_is_taken_as_it_is_asked_for() -> None:
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_is_bf16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert choose_precision("auto", torch.device("cuda")) == chosen


def test_auto_precision_without_a_measurement_is_fp32_on_cpus() -> None:
    assert choose_precision("auto", CPU) == "fp32"


LAUNCHED = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "3",
}  # fmt: skip


def test_a_launcher_says_which_process_this_is() -> None:
    assert launch_environment(LAUNCHED) == (1, 4, 1, 2, 3, "node-0:29500", False)
    assert launch_environment({}) is None
    assert launch_environment({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": ""}) is None, (
        "as some clusters set for one process"
    )
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert launch_environment(one) == (0, 1, 0, 1, 0, "localhost:1", False)


@pytest.mark.parametrize("name", sorted(LAUNCHED))
@pytest.mark.parametrize("value", [None, "", " ", "x", "-1", "1.5", "99", "9" * 30, "\u0663"])
def test_what_launchers_set_is_right_or_refused_by_name(name: str, value: str | None) -> None:
    given = {key: text for key, text in (LAUNCHED | {name: value}).items() if text is not None}
    defaults = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RESTART_COUNT": 0}
    if not (value or "").strip() and name in defaults:
        place = launch_environment(given)
        assert place is not None
        assert defaults[name] in (place.local_rank, place.local_size, place.restarts)
    elif (name == "MASTER_ADDR" and value and value.strip()) or (
        value == "99" and name in ("WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    ):
        assert launch_environment(given) is not None
    else:
        with pytest.raises(DeviceError, match=name):
            launch_environment(given)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_ask_for_a_stop_are_noted(number: int) -> None:
    with interruptible() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_autocast_multiplies_in_bf16_or_changes_nothing() -> None:
    matrix = torch.randn(4, 4)
    with autocast(CPU, "bf16"):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (matrix @ matrix).dtype == torch.float32


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "step", 6) == 4485653450691351633
    assert derive_seed(1, "weights") == 2891528143651911317


def test_different_keys_have_different_seeds() -> None:
    keys = [(seed, name, step) for seed in range(5) for name in ("step", "sample") for step in range(100)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_seeding_by_a_key_repeats_what_torch_draws() -> None:
    with torch.random.fork_rng():
        draws = []
        for step in (3, 4, 3):
            seed_everything(0, step)
            draws.append(torch.rand(5).tolist())
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible() as interrupt:
        assert not interrupt.requested
        assert signal.getsignal(number) == interrupt.note, "or this would be the end of the tests"
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_there_are_no_signals_to_note() -> None:
    seen: list[Interrupt] = []

    def run() -> None:
        with interruptible() as interrupt:
            seen.append(interrupt)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not seen[0].requested


def test_processes_that_start_again_never_meet_the_dead() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        for generation in ("one", "two", "three"):
            late = pool.submit(
                _store_of_live_ranks, store, 1, 2
            )  # before the first, so that it finds what the dead left
            time.sleep(0.1)
            assert not late.done()
            first = _store_of_live_ranks(store, 0, 2)
            assert not first.check(["address"])
            first.set("address", generation)
            assert late.result(timeout=120).get("address").decode() == generation


WAITING = """
import signal, sys, torch
from gemmule.errors import DeviceError
from gemmule.processes import Terminated, terminated_as_interrupted
from gemmule.distributed import process_group

signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
try:
    with terminated_as_interrupted(), process_group(torch.device("cpu")):
        pass
except (DeviceError, Terminated) as error:
    print(repr(error))
"""


def waiting(port: int, seconds: float) -> str:
    """What ends the first process of two that waits for the other, and gets SIGTERM after some seconds."""
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    command = [sys.executable, "-c", WAITING, str(seconds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_can_be_stopped() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert waiting(port, 5) == "Terminated()\n"


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = waiting(port, 60)
    assert said.startswith(f"DeviceError('127.0.0.1:{port}: the processes of the run cannot meet there (")
    assert "address already in use" in said
