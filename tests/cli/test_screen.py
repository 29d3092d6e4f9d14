import io
from typing import Any

import pytest
from rich.console import Console

from gemmule.cli import screen as screen_module
from gemmule.cli.screen import Screen, describe_metrics


def line_of(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens_per_second": 1234.5, "seconds": 2.0 * step} | more


VALIDATED = {"val_loss": 2.2, "val_bits_per_byte": 0.9, "val_perplexity": 9.0}


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> tuple[Screen, io.StringIO]:
    """A screen that writes to text."""
    text = io.StringIO()
    monkeypatch.setattr(
        screen_module,
        "Console",
        lambda **options: Console(**options | {"stderr": False}, file=text, force_terminal=terminal, width=100),
    )
    return Screen(), text


def test_a_line_of_metrics_in_words() -> None:
    assert describe_metrics(line_of(5), 100) == "step   5/100  train 2.500"
    assert describe_metrics(line_of(100, **VALIDATED), 100) == (
        "step 100/100  train 2.500  validation 2.200 nats/token, 0.900 bits/byte"
    )
    without = VALIDATED | {"val_bits_per_byte": None}  # a tokenizer that changes the text
    assert describe_metrics(line_of(5, **without), 100) == "step   5/100  train 2.500  validation 2.200 nats/token"
    assert describe_metrics(line_of(7, **VALIDATED, val_floor=2.0), 9).endswith(", +10.0% above the floor of 2.000")


def test_without_a_terminal_each_piece_of_work_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=False)
    with screen:
        for label in ("reading", "encoding"):
            for done in range(5):
                screen.progress(label, done, 5)
    assert text.getvalue() == "reading ...\nencoding ...\n"


def test_without_a_terminal_ten_lines_tell_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=False)
    with screen:
        for step in range(10, 1001, 10):
            screen.training(line_of(step, **(VALIDATED if step == 550 else {})), 1000)
    lines = text.getvalue().splitlines()[1:]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == sorted([*range(100, 1001, 100), 550])
    assert lines[0] == "step  100/1000  train 2.500  1,234 tokens/s  0:30:00 left"


def test_a_terminal_shows_the_training_and_keeps_the_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=True)
    with screen:
        for step in range(1, 11):
            screen.training(line_of(step, **(VALIDATED if step in (5, 10) else {})), 20)
        screen.samples(["Once upon a time", "Then"])
    assert text.getvalue().count("validation 2.200 nats/token") == 2
    last = text.getvalue().rpartition("step 10/20")[2]
    for part in ("2.500 nats/token", "1,234 tokens/s", "0.900 bits/byte", "Once upon a time"):
        assert part in last, part


def test_a_full_bar_goes_away_and_work_of_unknown_length_shows_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=True)
    with screen:
        screen.progress("encoding", 4, 5)
        assert [task.description for task in screen._progress.tasks] == ["encoding"]
        screen.progress("encoding", 5, 5)
        assert screen._progress.tasks == []
        screen.progress("compiling", 0, None)
        assert [task.fields["note"] for task in screen._progress.tasks] == [""]
        screen._live.refresh()
        assert "0:00:00" in text.getvalue()
        screen.progress("reading", 1200, None)
        assert [task.fields["note"] for task in screen._progress.tasks] == ["1,200"]


def test_what_would_steer_a_terminal_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=False)
    screen.samples(["\x1b]0;title\x07 one\r\ntwo \u202egnp.exe \x9b2J"])
    assert text.getvalue() == "  | \\x1b]0;title\\x07 one\\r\n  | two \\u202egnp.exe \\x9b2J\n"


def test_what_is_said_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = shown(monkeypatch, terminal=False)
    long = "[bold]a story[/bold] " * 20
    screen.print(long)
    assert text.getvalue() == long + "\n"
