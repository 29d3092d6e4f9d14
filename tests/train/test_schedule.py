import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gemmule.train.schedule import SCHEDULES, ScheduleSettings, learning_rate_factor

schedules = st.builds(
    ScheduleSettings,
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup_share=st.floats(0, 0.9),
    final=st.floats(0, 1),
    decay_share=st.floats(0.01, 1),
)


def rates(steps: int, settings: ScheduleSettings) -> list[float]:
    return [learning_rate_factor(step, steps, settings) for step in range(steps)]


def test_every_schedule_can_be_chosen() -> None:
    for name in SCHEDULES:
        assert ScheduleSettings.model_validate({"name": name}).name == name
    with pytest.raises(ValidationError):
        ScheduleSettings.model_validate({"name": "linear"})


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
