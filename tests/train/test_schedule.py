from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gemmule.errors import RecipeError
from gemmule.run_folder import read_json_lines
from gemmule.settings import check_recipe
from gemmule.train.schedule import SCHEDULES, ScheduleSettings, lr_scale
from runs import gemmule, overrides

schedules = st.builds(
    ScheduleSettings,
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup_share=st.floats(0, 0.9),
    final=st.floats(0, 1),
    decay_share=st.floats(0.01, 1),
)


def rates(steps: int, settings: ScheduleSettings) -> list[float]:
    return [lr_scale(step, steps, settings) for step in range(steps)]


def linear(done: float, settings: ScheduleSettings) -> float:
    """Fall in a line."""
    return 1 - (1 - settings.final) * done


def test_every_schedule_can_be_chosen_and_no_other() -> None:
    for name in SCHEDULES:
        assert check_recipe({"name": name}, ScheduleSettings, "x").name == name
    with pytest.raises(RecipeError, match=r'name = "linear": no such schedule; there are cosine, wsd, constant'):
        check_recipe({"name": "linear"}, ScheduleSettings, "x")


@pytest.mark.slow
def test_one_line_in_schedules_adds_a_schedule_that_trains(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "linear", linear)
    changes = overrides("train.steps=5", "schedule.name=linear", "schedule.warmup_share=0", "schedule.final=0.5")
    assert gemmule("train", tiny_recipe, *changes, "--out", tmp_path / "run").code == 0
    rates = [line["lr"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 * factor for factor in (1, 0.875, 0.75, 0.625, 0.5)])


@given(steps=st.integers(1, 200), settings=schedules)
def test_rate_rises_in_equal_steps_to_the_peak_and_never_rises_again(steps: int, settings: ScheduleSettings) -> None:
    curve = rates(steps, settings)
    warmup = round(settings.warmup_share * steps)
    assert curve[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    after = curve[warmup:]
    assert after[:1] == pytest.approx([1.0][: len(after)]), "the step after the warm-up has the peak rate"
    assert after == sorted(after, reverse=True)
    assert curve[0] > 0, "the first step learns already"


@given(steps=st.integers(20, 200), settings=schedules)
def test_last_step_has_the_final_rate(steps: int, settings: ScheduleSettings) -> None:
    last = rates(steps, settings)[-1]
    assert last == pytest.approx(1 if settings.name == "constant" else settings.final, abs=1e-9)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    curve = rates(101, ScheduleSettings(name="cosine", warmup_share=0, final=0.2))
    assert curve[50] == pytest.approx(0.6)
    assert curve[25] == pytest.approx(0.2 + 0.8 * 0.8535533905932737)  # (1 + cos(pi/4)) / 2


def test_wsd_stays_at_the_peak_and_falls_in_equal_steps() -> None:
    curve = rates(101, ScheduleSettings(name="wsd", warmup_share=0, decay_share=0.2, final=0.0))
    assert curve[:81] == pytest.approx([1.0] * 81)
    assert curve[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 101)])


def test_shares_outside_0_to_1_are_refused() -> None:
    for wrong in ({"warmup_share": 1.1}, {"final": -0.1}, {"decay_share": 0.0}, {"decay_share": 1.5}):
        with pytest.raises(ValidationError):
            ScheduleSettings.model_validate(wrong)
