"""What `gemmule generate MODEL --replay FILE` shows."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemmule.cli.screen import print_json
from gemmule.errors import GemmuleError, SourceError

if TYPE_CHECKING:
    from gemmule.inference.runners import Decoding
    from gemmule.serve.local import LocalModel, Repetition


def show_replay(
    model: str, file: Path, device: str, decoding: "Decoding", int8: bool, as_json: bool, adapters: tuple[str, ...] = ()
) -> None:
    """Repeat the model's replies in a file of `gemmule chat` or of the server's page, and compare every token.

    Replies of other models are left out, unless all are. GemmuleError where a token is another, SourceError for no such
    file, also where no reply of it can be repeated.
    """
    from gemmule.cli.chat import open_model
    from gemmule.inference.sheets import read_replies
    from gemmule.serve.local import LocalModel, repeat

    replies = read_replies(file)
    if not replies:
        raise SourceError(f"--replay {file}: no reply has the tokens and the seed that repeat it")
    local = LocalModel(open_model(model, device, decoding, int8, adapters=adapters))
    own = [reply for reply in replies if reply.piece.fingerprint in (None, local.fingerprint)]
    found = []
    for reply in own or replies:
        repetition = repeat(local, reply.piece)
        found.append((reply, repetition))
        if not as_json:
            typer.echo(f"{reply.title}, reply {reply.number}: {_sentence(local, repetition)}")
    different = sum(repetition.differs is not None for _, repetition in found)
    if as_json:
        described = [
            {
                "title": reply.title,
                "reply": reply.number,
                "same": repetition.differs is None,
                "differs_at": None if repetition.differs is None else repetition.differs + 1,
                "tokens": len(repetition.expected),
                "fingerprint": reply.piece.fingerprint,
            }
            for reply, repetition in found
        ]
        print_json({"same": not different, "fingerprint": local.fingerprint, "replies": described})
    others = sorted({each.piece.fingerprint for each in replies if each.piece.fingerprint} - {local.fingerprint})
    if others:
        left_out = f"; {len(replies) - len(own)} replies of others are left out" if own else ""
        note = f"this model's fingerprint is {local.fingerprint}, the file has {', '.join(others)}{left_out}"
        typer.echo(f"note: {note}", err=True)
    if different:
        raise GemmuleError(f"--replay {file}: {different} of {len(found)} replies differ")
    if not as_json:
        typer.echo(f"all {len(found)} replies are the same, token for token")


def _sentence(model: "LocalModel", repetition: "Repetition") -> str:
    """Describe how a reply compares."""
    expected, index = repetition.expected, repetition.differs
    if index is None:
        return f"all {len(expected)} tokens are the same"

    def shown(ids: list[int]) -> str:
        if index >= len(ids):
            return "nothing"
        return f"{ids[index]} ({model.served.tokenizer.decode([ids[index]], specials=True)!r})"

    now, then = shown(repetition.generated), shown(expected)
    return f"token {index + 1} of {len(expected)} differs: {now} instead of {then}"
