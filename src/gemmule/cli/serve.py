"""`gemmule serve MODEL...`: an HTTP server in the shape of OpenAI's API."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gemmule.cli.options import AdapterOption, DecodingOption, DeviceOption, Int8Option, adapters_of_one
from gemmule.cli.screen import Screen, logged_to
from gemmule.errors import MissingExtra, UserError

KEY_VARIABLE = "GEMMULE_API_KEY"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders, run folders or .gguf files; also NAME=MODEL."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with API keys, one a line; or the environment variable {KEY_VARIABLE}."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name under which the server is reached (repeatable).")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may send requests (repeatable).")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, max=1024, help="Sequences that run at once; the rest waits.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Sequences that wait; more are refused with 429.")] = 256,
    cache: Annotated[
        str | None, typer.Option(help="Size of the KV cache of each model, such as 2GB; a quarter of the free memory.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and reply at most; those of the model.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Prompt tokens per step.")] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to finish what runs after SIGTERM.")] = 30,
    chat: Annotated[bool, typer.Option("--chat", help="Chat with models that have no chat template, too.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Take up newer checkpoints of runs as they appear.")] = False,
    device: DeviceOption = "auto",
    decoding: DecodingOption = "auto",
    int8: Int8Option = False,
    adapter: AdapterOption = None,
    access_log: Annotated[
        bool, typer.Option(help="Write a line of JSON for each request to standard output, without prompts.")
    ] = True,
) -> None:
    """Serve models to every client that speaks OpenAI's API.

    Examples:

        gemmule serve runs/story

        gemmule serve story=runs/story google=models/gemma-3-270m-it --port 8080

        gemmule serve runs/story --host 0.0.0.0 --api-key-file keys.txt --allow-host stories.example.org
    """
    try:
        from gemmule.serve.run import run
        from gemmule.serve.settings import Limits, ServerSettings, name_models
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or "fastapi").partition(".")[0], "serve", "gemmule serve") from None

    settings = ServerSettings(
        models=name_models(models),
        host=host,
        port=port,
        api_keys=read_keys(api_key_file),
        allowed_hosts=frozenset(allow_host or ()),
        allowed_origins=frozenset(allow_origin or ()),
        limits=Limits(queue=max_queue, samples=min(64, max_rows)),
        max_rows=max_rows,
        context=context,
        chunk=chunk,
        cache_bytes=None if cache is None else read_size(cache),
        drain_seconds=drain,
        device=device,
        decoding=decoding,
        int8=int8,
        adapters=adapters_of_one(adapter, models),
        chat=chat,
        follow=follow,
        access_log=access_log,
    )
    with logged_to(Screen()):
        run(settings, lambda sentence: typer.echo(sentence, err=True))


def read_keys(file: Path | None) -> tuple[bytes, ...]:
    """Return the API keys of a file, or of the environment; UserError where they cannot be."""
    from gemmule.serve.settings import read_api_keys

    if file is not None:
        try:
            return read_api_keys(file.read_bytes(), f"--api-key-file {file}")
        except OSError as error:
            raise UserError(f"--api-key-file {file}: cannot be read: {error.strerror}") from None
    given = os.environb.get(KEY_VARIABLE.encode())
    return read_api_keys(given, KEY_VARIABLE) if given else ()


def read_size(text: str) -> int:
    """Return the bytes that a size such as 512MB, 2GB or 1.5GiB stands for; UserError where it is none."""
    units = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(number) :].strip().lower() or "b"
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--cache {text}: not a size; write 512MB, 2GB or 1.5GiB") from None
    if size <= 0:
        raise UserError(f"--cache {text}: must be above 0")
    return size
