"""What `gemmule generate MODEL --replay FILE` shows."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemmule.cli.screen import print_json
from gemmule.errors import GemmuleError, SourceError

if TYPE_CHECKING:
    from gemmule.inference.runners import Decoding
    from gemmule.serve.local import LocalModel, Repetition


def show_replay(model: str, file: Path, device: str, decoding: "Decoding", int8: bool, as_json: bool) -> None:
    """Repeat the model's pieces of a conversation; GemmuleError where a token is another, SourceError for no such file.

    SourceError also where no piece of it can be repeated.
    """
    from gemmule.cli.chat import open_model
    from gemmule.inference.conversation import read_replies
    from gemmule.serve.local import LocalModel, replay

    conversation = read_replies(file)
    if not any(piece.generated for piece in conversation.pieces):
        raise SourceError(f"--replay {file}: no piece has the tokens and the seed of a model's reply")
    local = LocalModel(open_model(model, device, decoding, int8), conversation.chat)
    found = []
    for each in replay(local, conversation):
        found.append(each)
        if not as_json:
            typer.echo(_sentence(local, each))
    different = sum(each.differs is not None for each in found)
    if as_json:
        pieces = [
            {
                "piece": each.piece + 1,
                "same": each.differs is None,
                "differs_at": None if each.differs is None else each.differs + 1,
                "tokens": len(each.expected),
                "fingerprint": each.fingerprint,
            }
            for each in found
        ]
        print_json({"same": not different, "fingerprint": local.fingerprint, "pieces": pieces})
    others = sorted({each.fingerprint for each in found if each.fingerprint not in (None, local.fingerprint)})
    if others:
        written = ", ".join(str(each) for each in others)
        typer.echo(f"note: this model's fingerprint is {local.fingerprint}, the file has {written}", err=True)
    if different:
        raise GemmuleError(f"--replay {file}: {different} of {len(found)} replies differ")
    if not as_json:
        typer.echo(f"all {len(found)} replies are the same, token for token")


def _sentence(model: "LocalModel", repetition: "Repetition") -> str:
    """Say how a reply compares."""
    piece, expected, index = repetition.piece + 1, repetition.expected, repetition.differs
    if index is None:
        return f"piece {piece}: all {len(expected)} tokens are the same"

    def shown(ids: list[int]) -> str:
        if index >= len(ids):
            return "nothing"
        return f"{ids[index]} ({model.served.tokenizer.decode([ids[index]], specials=True)!r})"

    now, then = shown(repetition.generated), shown(expected)
    return f"piece {piece}: token {index + 1} of {len(expected)} differs: {now} instead of {then}"
