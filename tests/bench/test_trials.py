import pytest

from harness.backends import Backend
from harness.trials import Budget, machine, peak, ratios, run_trials, spread


def test_spread_has_median_quartiles_and_trials() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "quartiles": [2, 4], "trials": [4, 1, 2, 3, 5]}
    assert spread([7.0]) == {"median": 7, "quartiles": [7, 7], "trials": [7]}


def test_ratios_are_speedups_per_trial() -> None:
    found = ratios({"gemmule": [10.0, 30.0], "other": [5.0, 10.0]}, "gemmule")
    assert list(found) == ["other"]
    assert found["other"]["trials"] == [2, 3]


def test_peak_is_the_largest_known() -> None:
    assert peak([{"peak_memory": 3}, {"peak_memory": None}, {"peak_memory": 5}]) == 5
    assert peak([{"peak_memory": None}]) is None


def test_trials_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(backend: Backend) -> dict[str, str]:
        order.append(backend.name)
        return {"name": backend.name}

    monkeypatch.setattr("harness.trials.run_backend", note)
    labels: list[str] = []
    measurements = run_trials([Backend("a", [], {}), Backend("b", [], {})], 2, lambda label, *_: labels.append(label))
    assert order == ["a", "b", "a", "b"]
    assert {name: len(trials) for name, trials in measurements.items()} == {"a": 2, "b": 2}
    assert labels[-1] == "trial 2 of 2: b"


def test_machine_tells_what_figures_depend_on() -> None:
    assert set(machine()) == {"cpu", "cores", "gpu", "platform", "python", "versions"}
    assert machine()["versions"]["torch"]


def test_a_budget_is_plain_numbers() -> None:
    assert Budget(3, 10.0, None, 3)._asdict() == {"trials": 3, "seconds": 10.0, "steps": None, "warmup": 3}
