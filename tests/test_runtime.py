import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from gemmule.errors import DeviceError
from gemmule.runtime import (
    Interrupt,
    _meet,
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


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_on_cpus_that_are_fast_in_it(
    monkeypatch: pytest.MonkeyPatch, fast: bool, chosen: str
) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: fast, raising=False)
    assert choose_precision("auto", CPU) == chosen


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
            late = pool.submit(_meet, store, 1, 2)  # before the first, so that it finds what the dead left
            time.sleep(0.1)
            assert not late.done()
            first = _meet(store, 0, 2)
            assert not first.check(["address"])
            first.set("address", generation)
            assert late.result(timeout=10).get("address").decode() == generation
