"""The session of `gemmule chat`: messages, replies, and the commands that begin with a slash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmule.cli.chat_terminal import ChatTerminal, Message
from gemmule.errors import GemmuleError, UserError
from gemmule.fields import LARGEST_REQUEST_SEED, UNSET, settings_of, toml_value
from gemmule.inference.conversation import (
    INITIAL,
    ChatModel,
    Conversation,
    Piece,
    ReplySettings,
    Usage,
)
from gemmule.inference.requests import draw_seed
from gemmule.inference.sheets import is_chat, read_sheet, read_sheets, write_conversation
from gemmule.processes import Terminated
from gemmule.reading import local_path
from gemmule.settings import check_recipe

_SHOWN = 60  # characters of a piece in a list

HELP = """/set              the settings, with their values
/set NAME VALUE   change one; none takes it back where it need not be set
/retry            another reply in place of the last one, which stays as a branch
/edit N [TEXT]    write piece N anew; a branch begins there
/branch           the branches, and the pieces of this one
/branch B [N]     go to branch B, and back to its piece N
/save FILE        keep all of it in a file, for /load and `gemmule generate MODEL --replay FILE`
/load FILE [N]    continue what was kept here or exported by the page of `gemmule serve`; N is a text of several
/tokens           tokens of the context that are used, cached and left, and tokens per second
/help             this list
/quit             ends, as Ctrl-D does
A line that ends in a backslash continues in the next one; a block of lines stands between triple quotes.
// begins a text with a slash. Ctrl-C stops a reply, Ctrl-D ends."""


class Session:
    """A conversation that continues with what the user enters."""

    def __init__(self, model: ChatModel, name: str, terminal: ChatTerminal) -> None:
        self.model, self.name, self.terminal = model, name, terminal
        self.conversation = Conversation(model.chats, name)
        self.settings = INITIAL
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: terminal.note(HELP),
            "set": self.set_setting,
            "retry": self.retry,
            "edit": self.edit,
            "branch": self.branch,
            "save": self.save,
            "load": self.load,
            "tokens": self.show_tokens,
            "quit": self.quit,
        }
        self._over = False

    def run(self) -> None:
        """Read messages and answer them until the input ends, or /quit; without a terminal the first error ends it."""
        while not self._over:
            try:
                message = self.terminal.read_message()
                if message is None:
                    if self.terminal.interactive:
                        self.terminal.write("\n")
                    return
                self.answer(message)
            except Terminated:
                raise
            except KeyboardInterrupt:
                if not self.terminal.interactive:
                    raise
                self.terminal.write("\n")
            except GemmuleError as error:
                if not self.terminal.interactive:
                    raise
                self.terminal.note(str(error))

    def answer(self, message: Message) -> None:
        """Run a command, or add the user's piece and reply; UserError for a command that there is not."""
        text = message.text
        if not message.block and text.startswith("/") and not text.startswith("//"):
            name, _, given = text[1:].partition(" ")
            if name not in self._commands:
                raise UserError(f"/{name}: no such command; there are /{', /'.join(self._commands)}")
            self._commands[name](given.lstrip())
            return
        if not message.block:
            text = text.removeprefix("/") if text.startswith("//") else text
        if self.conversation.chat:
            if text.strip():
                self._add_words(text)
            return
        before = "".join(piece.text for piece in self.conversation.shown())
        if text:
            self._add_words(_joined(before, text))
        else:
            self._reply()

    def quit(self, _given: str) -> None:
        """End the session."""
        self._over = True

    def set_setting(self, given: str) -> None:
        """Change a setting, or show all; RecipeError where the value cannot be."""
        name, _, value = given.strip().partition(" ")
        if not name:
            now = self.settings.model_dump(mode="json")
            for setting in settings_of(ReplySettings):
                current = now[setting.key]
                shown = UNSET if current in (None, [], {}, "") else toml_value(current)
                self.terminal.note(f"{setting.key} = {shown}   {setting.meaning}")
            return
        if not value.strip():
            raise UserError(f"/set {name}: give a value, such as /set temperature 0.5")
        now = self.settings.model_dump(mode="json", exclude_defaults=True)
        changes = [f"{name}={value}"]
        if name in ("stop", "logit_bias", "system") and value.strip() == UNSET:
            now.pop(name, None)
            changes = []
        self.settings = check_recipe(now, ReplySettings, "of /set", changes)

    def retry(self, _given: str = "") -> None:
        """Reply once more to what came before the last reply; UserError where there is none."""
        conversation = self.conversation
        if conversation.current is None:
            raise UserError("/retry: nothing was said yet")
        before, count = conversation.current, len(conversation.pieces)
        last = conversation.pieces[conversation.current]
        if last.author == "model":
            conversation.current = self._start_of(last).parent
        try:
            self._reply()
        finally:
            if len(conversation.pieces) == count:
                conversation.current = before

    def edit(self, given: str) -> None:
        """Write a piece of this branch anew, and reply where it was the user's; UserError where there is no such."""
        number, _, text = given.partition(" ")
        conversation, path = self.conversation, self.conversation.path()
        piece = conversation.pieces[path[_number("/edit", number, len(path)) - 1]]
        if not text:
            text = self._edited(piece.text)
        if not text.strip():
            raise UserError(f"/edit {number}: write the new text, as in /edit {number} TEXT")
        conversation.current = piece.parent
        if piece.author == "user":
            kept = piece.text[: len(piece.text) - len(piece.text.lstrip())]  # what joined it to the piece before
            self._add_words(text if text[:1].isspace() else kept + text)
        else:
            conversation.add(Piece("model", text, None if conversation.chat else self.model.encode(text)))

    def branch(self, given: str) -> None:
        """List the branches, or go to one of them, or to one of its pieces; UserError where there is no such."""
        conversation, leaves = self.conversation, self.conversation.branches()
        if not given:
            here = set(conversation.path())
            for number, leaf in enumerate(leaves, 1):
                path = conversation.path(leaf)
                mark = "*" if here.issubset(path) else " "
                last = _shortened(conversation.pieces[leaf].text)
                self.terminal.note(f"{mark} {number}: {len(path)} pieces, the last one {last}")
            for number, piece in enumerate(conversation.shown(), 1):
                self.terminal.note(f"    {number} {piece.author}: {_shortened(piece.text)}")
            return
        words = given.split()
        leaf = leaves[_number("/branch", words[0], len(leaves)) - 1]
        path = conversation.path(leaf)
        place = _number(f"/branch {words[0]}", words[1], len(path)) if len(words) > 1 else len(path)
        if conversation.chat and conversation.pieces[path[place - 1]].author == "user":
            raise UserError(f"/branch: piece {place} is yours; go to one of the model's, or /edit {place}")
        conversation.current = path[place - 1]
        self.show()

    def save(self, given: str) -> None:
        """Write the conversation to a file; SourceError, OutputError where it cannot be."""
        write_conversation(_path("/save", given), self.conversation, self.settings)

    def load(self, given: str) -> None:
        """Continue a text or chat of a file; SourceError where it is no such file, UserError where it cannot be.

        FILE alone where there is one; FILE and its number where there are several.
        """
        path, number = _path("/load", given), ""
        if not path.exists() and given.strip().rpartition(" ")[2].isdigit():
            name, _, number = given.strip().rpartition(" ")
            path = _path("/load", name)
        sheets = read_sheets(path)
        if len(sheets) != 1 and not number:
            listed = "".join(f"\n  {place} {_titled(sheet)}" for place, sheet in enumerate(sheets, 1))
            raise UserError(f"/load {path}: holds {len(sheets)} texts; add the number of one{listed}")
        sheet = sheets[_number(f"/load {path}", number, len(sheets)) - 1 if number else 0]
        if is_chat(sheet) != self.model.chats:
            kind, option = ("a chat", "--turns") if is_chat(sheet) else ("a text", "--story")
            raise UserError(f"/load {given}: holds {kind}; start with {option}")
        self.conversation, self.settings = read_sheet(sheet)
        self.conversation.model = self.name
        others = False
        for piece in self.conversation.pieces:
            if piece.fingerprint not in (None, self.model.fingerprint):
                piece.tokens, others = None, True  # ids of what may be another vocabulary
        self.show()
        if others:
            self.terminal.note("(some of it was generated by another model, or with another decoding)")

    def show(self) -> None:
        """Write the pieces of this branch."""
        for piece in self.conversation.shown():
            if self.conversation.chat:
                self.terminal.note(f"{piece.author}:")
            self.terminal.write(piece.text + "\n" * self.conversation.chat)
        if not self.conversation.chat:
            self.terminal.write("\n")

    def show_tokens(self, _given: str = "") -> None:
        """Write how much of the context is used, cached and left, as of the last reply, and its speed."""
        usage = next((piece.usage for piece in reversed(self.conversation.shown()) if piece.usage is not None), None)
        if usage is None:
            self.terminal.note("not known before a reply")
            return
        used = usage.prompt + usage.generated
        left = "unknown" if self.model.context is None else f"{self.model.context - used:,}"
        self.terminal.note(f"used {used:,}, cached {usage.cached:,}, left {left}, tokens/s {_speed(usage)}")
        if warning := self._beyond(usage):
            self.terminal.note(warning)

    def _beyond(self, usage: Usage) -> str | None:
        """Return a warning where the text is longer than the sequences that the model was trained at."""
        used, trained = usage.prompt + usage.generated, self.model.trained_context
        if trained is None or used <= trained:
            return None
        return f"warning: {used:,} tokens; the model was trained at sequences of {trained:,}, and may fail beyond them"

    def _start_of(self, reply: Piece) -> Piece:
        """Return the piece with which a reply begins: branches divide replies, and those of a chat may be continued."""
        pieces = self.conversation.pieces
        while reply.parent is not None:
            above = pieces[reply.parent]
            if not reply.continues and not (self.conversation.chat and above.author == "model"):
                break
            reply = above
        return reply

    def _add_words(self, text: str) -> None:
        """Add the user's piece and reply; without a reply a chat is as it was before."""
        conversation, before = self.conversation, self.conversation.current
        tokens = None if conversation.chat else self.model.encode(text)
        conversation.add(Piece("user", text, tokens))
        said = conversation.current
        try:
            self._reply()
        finally:
            if conversation.current == said and (conversation.chat or not self.terminal.interactive):
                conversation.pieces.pop()
                conversation.current = before

    def _reply(self) -> None:
        """Stream a reply, and add it."""
        seed = self._next_seed()
        piece = Piece("model", "", settings=self.settings.replace(seed=None), seed=seed)
        with self.terminal.interrupts(self.model.stop):
            try:
                for chunk in self.model.reply(self.conversation.shown(), self.settings, seed):
                    self.terminal.write(chunk.text)
                    piece.extend(chunk)
            finally:
                if piece.text:
                    self.terminal.write("\n")
        count = len(piece.tokens or ())
        if piece.text or piece.tokens:
            piece.end()
            piece.fingerprint = self.model.fingerprint
            self.conversation.add(piece)
        if self.terminal.interactive:
            self._comment(piece, count)

    def _comment(self, piece: Piece, count: int) -> None:
        """Note why a reply of so many tokens ended, where one would wonder, and when it goes beyond training."""
        if piece.finish == "stop" and not piece.text:
            self.terminal.note("(the model ends the text here)")
        if piece.finish == "length":
            more = "" if self.conversation.chat else "; an empty line continues"
            self.terminal.note(f"({count} tokens, max_tokens or the context ends it{more})")
        usage = piece.usage
        if usage is not None and (warning := self._beyond(usage)) and not self._beyond(usage._replace(generated=0)):
            self.terminal.note(warning)

    def _next_seed(self) -> int:
        seed = self.settings.seed
        if seed is None:
            return draw_seed()
        self.settings = self.settings.replace(seed=(seed + 1) % (LARGEST_REQUEST_SEED + 1))
        return seed

    def _edited(self, text: str) -> str:
        if not self.terminal.interactive:
            return ""
        if "\n" in text:  # more than a line of readline takes
            self.terminal.note(text)
            text = ""
        return self.terminal.read_line("edit> ", text) or ""


def _joined(before: str, text: str) -> str:
    """Put a space between a text and words that continue it, where neither has one."""
    separate = not before or before[-1].isspace() or text[0].isspace()
    return text if separate or not (text[0].isalnum() or text[0] in "\"'(“‘") else f" {text}"


def _number(command: str, given: str, most: int) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= most):
        there = f"give a number from 1 to {most}" if most else "there is none yet"
        raise UserError(f"{command} {given}".rstrip() + f": {there}")
    return int(given)


def _titled(sheet: dict[str, Any]) -> str:
    return f"{'chat' if is_chat(sheet) else 'text'}: {_shortened(sheet['title'])}"


def _path(command: str, given: str) -> Path:
    if not given:
        raise UserError(f"{command}: name a file")
    return local_path(given.strip())


def _shortened(text: str) -> str:
    line = " ".join(text.split()) or "(no text)"
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _speed(usage: Usage) -> str:
    """Return tokens per second after the first one."""
    measured = usage.generated > 1 and usage.seconds > 0
    return f"{(usage.generated - 1) / usage.seconds:,.0f}" if measured else "unknown"
