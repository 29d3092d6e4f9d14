"""Tasks as documents: rows of conversations, preferences or prompts, as `data.kind` asks for, and their checkers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gemmule.data.conversations import row_text
from gemmule.data.documents import Document
from gemmule.data.settings import DataSettings
from gemmule.data.text_tasks import check_text, make_text_task
from gemmule.errors import SourceError

# Set in a task whose wording training never sees.
HELD_OUT_WORDING = "held_out_wording"


def check_task(task: Mapping[str, Any], reply: str) -> dict[str, float]:
    """Return the components of the verdict on a reply, each 1.0 or 0.0, by the `task` of a row of prompts.

    KeyError or TypeError where the task is not one that a SOURCE of tasks has written.
    """
    from gemmule.storybook.tasks import check_reply

    if task["kind"] == "text":
        return {name: float(met) for name, met in check_text(task, reply).items()}
    return dict(check_reply(task, reply).components)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Parse kinds of tasks about stories, joined by +; SourceError for others."""
    from gemmule.storybook.tasks import KINDS

    kinds = tuple(text.split("+"))
    for kind in kinds:
        if kind not in KINDS:
            raise SourceError(f"storybook-tasks: there are no tasks of kind {kind!r}; there are {', '.join(KINDS)}")
    return kinds


class StorybookTaskRange(NamedTuple):
    """Tasks `start` to `stop` of a seed; held-out ones have other constraints, wordings and kinds of fault."""

    seed: int
    start: int
    stop: int
    size: int
    held_out: bool
    kinds: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The name of the corpus."""
        return "storybook-tasks"

    def read(self, settings: DataSettings) -> Iterator[Document]:
        """Yield the rows; a conversation knows the log-probability of its reply given the instruction."""
        from gemmule.storybook.tasks import make_preference, make_task

        for index in range(self.start, self.stop):
            if settings.kind == "preferences":
                pair = make_preference(self.seed, index, self.held_out)
                yield _preference(pair.task.instruction, pair.task.reply, pair.rejected)
                continue
            task = make_task(self.seed, index, self.held_out, self.kinds)
            if settings.kind == "prompts":
                wording = {HELD_OUT_WORDING: True} if task.wording_held_out else {}
                yield _prompt(task.instruction, {**task.goal, **wording})
            else:
                yield _conversation(task.instruction, task.reply, task.log_probability)


class TextTaskRange(NamedTuple):
    """A range of another SOURCE, whose documents become tasks; those that make none are left out."""

    inner: Any  # a range of the other SOURCE
    read_inner: Callable[[Any, DataSettings], Iterator[Document]]
    name: str
    size: int
    held_out: bool

    @property
    def origin(self) -> str:
        """The name of what is read."""
        return self.name

    def read(self, settings: DataSettings) -> Iterator[Document]:
        """Yield the rows; a document that is not UTF-8 is passed on, to be counted."""
        for document in self.read_inner(self.inner, settings.replace(kind="text")):
            if isinstance(document.text, bytes):
                yield document
            elif task := make_text_task(document.text, self.held_out):
                if settings.kind == "prompts":
                    yield _prompt(task.instruction, task.goal)
                else:
                    yield _conversation(task.instruction, document.text.strip())


def _conversation(instruction: str, reply: str, log_probability: float | None = None) -> Document:
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": reply}]
    return Document(row_text({"messages": messages}), log_probability)


def _preference(instruction: str, chosen: str, rejected: str) -> Document:
    messages = [{"role": "user", "content": instruction}]
    return Document(row_text({"messages": messages, "chosen": chosen, "rejected": rejected}))


def _prompt(instruction: str, task: Mapping[str, Any]) -> Document:
    return Document(row_text({"messages": [{"role": "user", "content": instruction}], "task": task}))
