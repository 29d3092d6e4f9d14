import itertools
import time

import pytest

from gemmule.train.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> itertools.count:  # type: ignore[type-arg]
    """Each look at the clock finds it a second later."""
    ticks = itertools.count(1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    return ticks


def test_stopwatch_counts_on_from_where_the_run_stopped(clock: object) -> None:
    watch = Stopwatch(50.0)
    assert watch.seconds == 51
    assert watch.seconds == 52


def test_stopwatch_stands_still_in_a_pause(clock: object) -> None:
    watch = Stopwatch()
    with watch.paused():  # entered a second after the start
        assert watch.seconds == 1
        for _ in range(10):
            time.perf_counter()
        assert watch.seconds == 1
    assert watch.seconds == 2


def test_a_pause_ends_with_an_error_too(clock: object) -> None:
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.paused():
        raise ZeroDivisionError
    assert watch.seconds == 2


def test_rate_is_of_the_tokens_since_the_last_time_without_pauses(clock: object) -> None:
    watch = Stopwatch()
    watch.add(300)
    watch.add(300)
    assert watch.rate() == 600  # one second
    with watch.paused():
        for _ in range(10):
            time.perf_counter()
    watch.add(100)
    assert watch.rate() == 50  # two looks at the clock: one to pause, one now
    assert watch.rate() == 0
