import pytest

from gemmule.bench.rounds import Effort, machine, peak, ratios, run_rounds, spread
from gemmule.bench.sides import Side


def test_spread_has_median_quartiles_and_rounds() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "quartiles": [2, 4], "rounds": [4, 1, 2, 3, 5]}
    assert spread([7.0]) == {"median": 7, "quartiles": [7, 7], "rounds": [7]}


def test_ratios_are_ours_over_theirs_round_by_round() -> None:
    found = ratios({"gemmule": [10.0, 30.0], "other": [5.0, 10.0]}, "gemmule")
    assert list(found) == ["other"]
    assert found["other"]["rounds"] == [2, 3]


def test_peak_is_the_largest_known() -> None:
    assert peak([{"peak_memory": 3}, {"peak_memory": None}, {"peak_memory": 5}]) == 5
    assert peak([{"peak_memory": None}]) is None


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def note(side: Side) -> dict[str, str]:
        turns.append(side.name)
        return {"name": side.name}

    monkeypatch.setattr("gemmule.bench.rounds.run_side", note)
    told: list[str] = []
    answers = run_rounds([Side("a", [], {}), Side("b", [], {})], 2, lambda label, *_: told.append(label))
    assert turns == ["a", "b", "a", "b"]
    assert {name: len(rounds) for name, rounds in answers.items()} == {"a": 2, "b": 2}
    assert told[-1] == "round 2 of 2: b"


def test_machine_tells_what_figures_depend_on() -> None:
    assert set(machine()) == {"cpu", "cores", "gpu", "platform", "python", "versions"}
    assert machine()["versions"]["torch"]


def test_effort_is_plain_numbers() -> None:
    assert Effort(3, 10.0, None, 3)._asdict() == {"rounds": 3, "seconds": 10.0, "steps": None, "warmup": 3}
