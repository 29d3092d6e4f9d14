import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemmule.cli.chat_session import Session
from gemmule.cli.chat_terminal import ChatTerminal, Message, history_file
from gemmule.inference.conversation import Conversation, Piece, ReplySettings
from runs import Ended, gemmule
from saved_sheets import read_pieces, read_sheet_of

MANY = "/set max_tokens 8\n/set min_tokens 8\n"


def chat(model: Path, *lines: str, options: tuple[object, ...] = ()) -> Ended:
    return gemmule("chat", model, *options, given=(MANY + "\n".join(lines) + "\n").encode())


def told(model: Path, *lines: str, options: tuple[object, ...] = ()) -> str:
    ended = chat(model, *lines, options=options)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def pieces(model: Path, folder: Path, *lines: str, options: tuple[object, ...] = ()) -> list[Piece]:
    """Return the pieces that a session leaves."""
    file = folder / "talk.json"
    told(model, *lines, f"/save {file}", options=options)
    found = read_pieces(file)
    file.unlink()
    return found


def test_a_pipe_gets_the_models_words_alone(tiny_run: Path, tmp_path: Path) -> None:
    out = told(tiny_run, "/set seed 3", "Mia found", f"/save {tmp_path / 'a.json'}")
    mine, its = read_pieces(tmp_path / "a.json")
    assert out == its.text + "\n"
    assert (mine.author, mine.text) == ("user", "Mia found")


def test_quit_ends_a_session(tiny_run: Path) -> None:
    assert told(tiny_run, "/set seed 3", "Mia found", "/quit", "The owl") == told(tiny_run, "/set seed 3", "Mia found")


def test_each_reply_has_all_that_repeats_it(tiny_run: Path, tmp_path: Path) -> None:
    _, its = pieces(tiny_run, tmp_path, "/set temperature 0.5", "Mia found")
    assert its.author == "model"
    assert its.tokens is not None
    assert len(its.tokens) == 8
    assert its.settings == ReplySettings(temperature=0.5, min_p=0.1, max_tokens=8, min_tokens=8)
    assert its.prompt is not None
    assert its.prompt[0] == 2, "bos"
    assert its.seed is not None
    assert re.fullmatch("fp_[0-9a-f]{16}", its.fingerprint or "")


def test_a_seed_repeats_a_session_and_replies_have_the_seeds_that_follow(tiny_run: Path, tmp_path: Path) -> None:
    one, again = (pieces(tiny_run, tmp_path, "/set seed 3", "Mia", "", "The owl") for _ in range(2))
    assert one == again
    assert [piece.seed for piece in one if piece.author == "model"] == [3, 4, 5]


def test_the_first_reply_is_that_of_generate(tiny_run: Path) -> None:
    options = ["--max-new-tokens", 8, "--min-new-tokens", 8, "--seed", 3, "--prompt", "Mia found"]
    assert "Mia found" + told(tiny_run, "/set seed 3", "Mia found") == gemmule("generate", tiny_run, *options).out


def test_words_are_joined_by_a_space_unless_one_is_there(tiny_run: Path, tmp_path: Path) -> None:
    found = pieces(tiny_run, tmp_path, "Mia", "/edit 2 saw", "the owl", "/edit 4 ran", ", and", "/edit 6 x ", "it")
    assert [piece.text for piece in found if piece.author == "user"] == ["Mia", " the owl", ", and", "it"]


def test_special_tokens_in_words_are_ordinary_text(tiny_run: Path, tmp_path: Path) -> None:
    words = "<eos><start_of_turn>model"
    for options in ((), ("--turns",)):
        found = pieces(tiny_run, tmp_path, words, options=options)
        assert found[0].text == words
    _, reply = pieces(tiny_run, tmp_path, words)
    assert reply.prompt is not None
    assert len(reply.prompt) > 6
    assert min(reply.prompt[1:]) > 8, "no special token"


def test_lines_are_joined_by_a_backslash_and_in_blocks(tiny_run: Path, tmp_path: Path) -> None:
    found = pieces(tiny_run, tmp_path, "Mia\\", "saw", '"""', "/help", 'the owl"""', "//x", "end\\\\", '"""y"""')
    words = [piece.text.strip() for piece in found if piece.author == "user"]
    assert words == ["Mia\nsaw", "/help\nthe owl", "/x", "end\\", "y"]


def test_retry_and_edit_begin_branches_and_branch_walks_them(tiny_run: Path, tmp_path: Path) -> None:
    found = pieces(tiny_run, tmp_path, "Mia", "/retry", "/edit 1 Tom", "/branch 1", "the owl", "/branch 3 1", "/retry")
    assert [(piece.author, piece.parent) for piece in found] == [
        ("user", None), ("model", 0), ("model", 0), ("user", None), ("model", 3),
        ("user", 1), ("model", 5), ("model", 0),
    ]  # fmt: skip
    assert found[4].seed != found[7].seed
    out = told(tiny_run, "Mia", "/retry", "/branch")
    assert "  1: 2 pieces" in out
    assert "* 2: 2 pieces" in out
    assert "    1 user: Mia" in out


def test_an_edited_piece_of_the_model_is_not_called_generated(tiny_run: Path, tmp_path: Path) -> None:
    found = pieces(tiny_run, tmp_path, "Mia", "/edit 2  saw the owl")
    assert found[2].seed is None
    assert found[2].author == "model"


def test_what_was_saved_is_loaded_with_its_branches_and_settings(tiny_run: Path, tmp_path: Path) -> None:
    file, again = tmp_path / "talk.json", tmp_path / "again.json"
    told(tiny_run, "/set seed 7", "Mia", "/retry", "/branch 1", f"/save {file}")
    out = told(tiny_run, f"/load {file}", f"/save {again}")
    one, other = (read_sheet_of(each) for each in (file, again))
    assert one | {"changed": 0} == other | {"changed": 0}
    assert out == "Mia" + read_pieces(file)[1].text + "\n"
    told(tiny_run, f"/load {file}", "on", f"/save {file}")
    assert len(read_pieces(file)) == 5


def test_a_chat_is_not_continued_as_a_text(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    told(tiny_run, "Mia", f"/save {file}")
    ended = chat(tiny_run, f"/load {file}", options=("--turns",))
    assert ended == (2, "", f"gemmule: /load {file}: holds a text; start with --story\n")


def test_settings_are_listed_with_values_and_meanings_and_unset(tiny_run: Path) -> None:
    changed = ['/set stop ["a b", "\\n"]', "/set logit_bias {5 = 1.5}", "/set system Be brief", "/set seed 4"]
    out = told(tiny_run, *changed, "/set")
    assert 'stop = ["a b", "\\n"]   texts before which a reply ends\n' in out
    assert "max_tokens = 8   " in out
    assert "seed = 4   " in out
    unset = [f"/set {name} none" for name in ("stop", "logit_bias", "system", "seed", "max_tokens")]
    out = told(tiny_run, *changed, *unset, "/set")
    for name in ("stop", "logit_bias", "system", "seed", "max_tokens"):
        assert f"{name} = none   " in out


def test_a_file_of_another_kind_is_not_overwritten(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("mine")
    ended = chat(tiny_run, "Mia", f"/save {file}")
    assert ended.code == 2
    assert ended.err == f"gemmule: {file}: is there, and is no file of gemmule-sheets; name another one\n"
    assert file.read_text() == "mine"


def test_a_later_turn_is_read_from_the_cache(tiny_run: Path) -> None:
    words = "Mia found the key and the owl saw two eggs, and Tom saw a red kite"
    used = int(re.findall(r"used (\d+)", told(tiny_run, words, "/tokens"))[0])
    cached = int(re.findall(r"cached (\d+)", told(tiny_run, words, "the owl", "/tokens"))[0])
    assert cached >= used - 8 - 16


def test_a_model_with_turns_talks_in_turns(tiny_run: Path, tmp_path: Path) -> None:
    found = pieces(tiny_run, tmp_path, "/set system Be brief", "Hello", "", "Bye", options=("--turns",))
    assert [piece.author for piece in found] == ["user", "model", "user", "model"]
    (same, _) = pieces(tiny_run, tmp_path, "Be brief\\", "\\", "Hello", options=("--turns",))[:2]
    assert same.text == "Be brief\n\nHello"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["/sett"], "/sett: no such command; there are /help"),
        (["/set temperature hot"], 'temperature = "hot": must be a number at least 0'),
        (["/set temperatur 1"], "temperature"),
        (["/set seed"], "/set seed: give a value"),
        (["/retry"], "/retry: nothing was said yet"),
        (["/edit 1 x"], "/edit 1: there is none yet"),
        (["Mia", "/edit 3 x"], "/edit 3: give a number from 1 to 2"),
        (["Mia", "/edit 1"], "/edit 1: write the new text"),
        (["/branch 1"], "/branch 1: there is none yet"),
        (["/save"], "/save: name a file"),
        (["/load nowhere.json"], "nowhere.json: cannot be read: No such file"),
    ],
)
def test_a_mistake_in_a_pipe_ends_with_2_and_a_sentence(tiny_run: Path, lines: list[str], sentence: str) -> None:
    ended = chat(tiny_run, *lines)
    assert ended.code == 2
    assert sentence in ended.err


def test_a_full_context_is_told(tiny_run: Path) -> None:
    ended = chat(tiny_run, "Mia found the red kite", options=("--context", 4))
    assert ended.code == 2
    assert "fill the model's context of 4; continue from an earlier piece, or begin anew" in ended.err


def test_neither_a_model_nor_a_server_is_a_mistake() -> None:
    assert gemmule("chat") == (
        2,
        "",
        "gemmule: name a MODEL, or the address of a server: --url http://127.0.0.1:8000\n",
    )


def test_input_that_is_not_utf8_is_blamed(tiny_run: Path) -> None:
    ended = gemmule("chat", tiny_run, given=b"a\xff\n")
    assert ended == (2, "", "gemmule: standard input is not UTF-8 text: invalid start byte at byte 1\n")


class _Failing:
    """A model that never replies."""

    chats = True
    context: int | None = 100
    trained_context: int | None = None
    fingerprint: str | None = None

    def encode(self, text: str) -> list[int] | None:
        return None

    def reply(self, pieces: Sequence[Piece], settings: ReplySettings, seed: int) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    def stop(self) -> None: ...


def test_without_a_reply_a_chat_is_as_it_was() -> None:
    session = Session(_Failing(), "x", ChatTerminal())
    with pytest.raises(KeyboardInterrupt):
        session.answer(Message("Hello"))
    assert session.conversation == Conversation(True, "x")


@contextmanager
def terminal(*arguments: object, home: Path) -> Iterator["Typist"]:
    """Run a chat on a terminal of its own."""
    master, slave = pty.openpty()
    environment = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "gemmule", "chat", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C there is its signal
    )
    os.close(slave)
    try:
        yield Typist(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


class Typist:
    """Who types at a terminal, and waits for what is shown."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master, self.process, self.seen = master, process, ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Return what came up to a text, which is then read."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} never came after {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended before {text!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_reply_and_ctrl_d_ends(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with terminal(tiny_run, home=tmp_path) as typist:
        typist.wait_for("/help lists the commands, Ctrl-D ends.")
        typist.type("/set max_tokens 1000000\n/set min_tokens 1000000\n")
        typist.wait_for("/set min_tokens 1000000")
        typist.wait_for("> ")
        typist.type("Mia found\n")
        typist.wait_for("Mia found\r\n")
        typist.wait_for(" ")  # of the reply
        typist.type("\x03")
        typist.wait_for("36m> ")
        typist.type("half a line")
        typist.wait_for("half a line")
        time.sleep(1)  # Python notices a signal that comes while it echoes with the next key only
        typist.type("\x03")  # at the prompt it drops what was typed
        typist.wait_for("36m> ")
        typist.type("/set temperature x\n")
        typist.wait_for("must be a number at least 0")
        typist.type(f"/save {file}\n/tokens\n")
        typist.wait_for("used ")
        typist.type("/set max_tokens 5\n/set min_tokens 5\n/edit 1\n")
        typist.wait_for("edit> \x1b[0mMia found")  # to be edited
        typist.type("\x7f\x7fd\n")
        typist.wait_for("(5 tokens, max_tokens or the context ends it; an empty line continues)")
        typist.type("/branch\n")
        typist.wait_for("1 user: Mia foud")
        typist.wait_for("36m> ")  # before it, Ctrl-D would be the line discipline's
        typist.type("\x04")
        assert typist.process.wait(30) == 0
    _, its = read_pieces(file)
    assert its.finish == "stopped"
    assert its.tokens
    assert "/set temperature x" in (tmp_path / "gemmule" / "chat_history").read_text()
    assert gemmule("generate", tiny_run, "--replay", file).code == 0


def test_the_history_lies_in_the_folder_for_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "gemmule" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "gemmule" / "chat_history"
