"""`gemmule chat MODEL`: talk to a model in the terminal, or write a text with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.chat_terminal import ChatTerminal
from gemmule.cli.options import AdapterOption, DecodingOption, DeviceOption, Int8Option, refuse_others
from gemmule.cli.screen import Screen, logged_to
from gemmule.cli.serve import KEY_VARIABLE, read_keys
from gemmule.errors import TokenizerError, UserError

if TYPE_CHECKING:
    from gemmule.inference.conversation import ChatModel
    from gemmule.inference.runners import Decoding
    from gemmule.serve.models import ServedModel


def chat(
    typed: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, run folder, .gguf file or owner/name; with --url its name there."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server of OpenAI's API, instead of a model here.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the key of the server; or the environment variable {KEY_VARIABLE}."),
    ] = None,
    turns: Annotated[
        bool | None,
        typer.Option("--turns/--story", help="Talk in turns, or write one text together; by default as MODEL can."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the conversation at most; those of MODEL.")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = "auto",
    decoding: DecodingOption = "auto",
    int8: Int8Option = False,
) -> None:
    """Talk to a model, or write a text with one that has no turns: your words, its words.

    Examples:

        gemmule chat runs/story

        gemmule chat models/gemma-3-270m-it

        gemmule chat --url http://127.0.0.1:8000

        echo "Tom found a red" | gemmule chat runs/story
    """
    from gemmule.cli.chat_session import Session

    chat_model: ChatModel
    if url is not None:
        from gemmule.serve.client import RemoteModel

        refuse_others(typed, "--url", {"model", "url", "api_key_file", "turns"})
        keys = read_keys(api_key_file)
        chat_model = remote = RemoteModel(url, model, keys[0] if keys else None, turns)
        name = remote.id
    elif api_key_file is not None:
        raise UserError(f"--api-key-file {api_key_file}: only a server asks for a key; give --url, too")
    elif model is None:
        raise UserError("name a MODEL, or the address of a server: --url http://127.0.0.1:8000")
    else:
        from gemmule.serve.local import LocalModel

        served = open_model(model, device, decoding, int8, context, tuple(adapter or ()))
        if turns and (served.tokenizer.start_of_turn_id is None or served.tokenizer.end_of_turn_id is None):
            raise TokenizerError(f"MODEL {model}: --turns needs a vocabulary with turn tokens; use --story")
        chat_model, name = LocalModel(served, turns), model
    terminal = ChatTerminal()
    session = Session(chat_model, name, terminal)
    if terminal.interactive:
        kind = "talk in turns" if chat_model.chats else "write a text together; an empty line lets it continue"
        terminal.note(f"{name}: {kind}. /help lists the commands, Ctrl-D ends.")
    with terminal.history():
        session.run()


def open_model(
    model: str,
    device: str,
    decoding: "Decoding",
    int8: bool,
    context: int | None = None,
    adapters: tuple[str, ...] = (),
) -> "ServedModel":
    """Open a MODEL with an engine of one row; UserError where it cannot be."""
    from gemmule.serve.models import load_model
    from gemmule.serve.settings import ModelSpec, ServerSettings

    spec = ModelSpec(model, model)
    settings = ServerSettings(
        (spec,), max_rows=1, context=context, device=device, decoding=decoding, int8=int8, adapters=adapters
    )
    with logged_to(Screen()):
        return load_model(spec, settings)
