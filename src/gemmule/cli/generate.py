"""`gemmule generate MODEL`: stream a continuation of a prompt."""

import os
import secrets
import shlex
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.options import (
    AdapterOption,
    DecodingOption,
    DeviceOption,
    FrequencyPenalty,
    Int8Option,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
    refuse_others,
)
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.errors import SourceError, UserError
from gemmule.fields import LARGEST_REQUEST_SEED

if TYPE_CHECKING:
    from gemmule.inference.requests import Event


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name.")],
    prompt: Annotated[
        str, typer.Option(help="The text to continue; - reads it from standard input.")
    ] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 256,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Before so many tokens no stop token is drawn.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text before which to stop (repeatable).")] = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.1,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of samples, with the seeds SEED, SEED + 1, ...")] = 1,
    seed: SamplingSeed = None,
    replay: Annotated[
        Path | None, typer.Option(help="Repeat the replies of a saved conversation, and compare every token.")
    ] = None,
    device: DeviceOption = "auto",
    decoding: DecodingOption = "auto",
    int8: Int8Option = False,
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of streaming text.")] = False,
) -> None:
    """Generate text from a model.

    Examples:

        gemmule generate runs/story/model

        gemmule generate runs/story --prompt - --num-samples 3 --seed 7 < beginning.txt

        gemmule generate runs/story --replay talk.json
    """
    if context.args:  # instead of an error that does not mention the option
        text = " ".join(context.args)
        raise UserError(f"unexpected argument {text!r}; use --prompt {shlex.quote(text)} to continue a text")
    if replay is not None:
        from gemmule.cli.replay import show_replay

        refuse_others(context, "--replay", {"model", "replay", "device", "decoding", "int8", "adapter", "as_json"})
        show_replay(model, replay, device, decoding, int8, as_json, tuple(adapter or ()))
        return
    if input_is_redirected() and getattr(context.get_parameter_source("prompt"), "name", "") == "DEFAULT":
        typer.echo("note: standard input is not read; --prompt - continues what comes from it", err=True)
    prompt = read_prompt(prompt)
    import gemmule
    from gemmule.inference.preparing import prepare_for_decoding

    with logged_to(Screen()):
        network, tokenizer = gemmule.load(model, device, adapter or ())
        network, decoding = prepare_for_decoding(network, model, decoding, int8)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": stop or (),
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "decoding": decoding,
    }
    first = secrets.randbits(32) if seed is None else seed
    samples: list[dict[str, Any]] = []
    for number in range(num_samples):
        own = (first + number) % (LARGEST_REQUEST_SEED + 1)
        if num_samples > 1 and not as_json:
            sys.stdout.write("\n" * (number > 0) + f"--- sample {number + 1} of {num_samples}, seed {own} ---\n")
        events = gemmule.generate(network, tokenizer, prompt, seed=own, **settings)
        samples.append(_show(prompt, events, quiet=as_json) | {"seed": own})
    if as_json:
        print_json({"prompt": prompt} | (samples[0] if num_samples == 1 else {"samples": samples}))


def _show(prompt: str, events: Iterable["Event"], quiet: bool) -> dict[str, Any]:
    """Stream a prompt and its continuation to standard output, unless `quiet`; return the continuation and its end."""
    text, tokens, finish = "", 0, None
    prefix = prompt  # shown with the first token, when the prompt was accepted
    for event in events:
        text, tokens, finish = text + event.text, tokens + 1, event.finish
        if not quiet:
            sys.stdout.write(prefix + event.text)
            sys.stdout.flush()
            prefix = ""
    if not quiet:
        sys.stdout.write("\n")
    return {"text": text, "tokens": tokens, "finish": finish}


def input_is_redirected() -> bool:
    """Whether standard input is a file or a pipe, so that somebody may expect it to be read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_prompt(given: str) -> str:
    """Return the prompt: the option's value, or for "-" standard input without its last line break.

    SourceError where it is not UTF-8.
    """
    try:
        if given != "-":  # bytes that the locale could not decode are tried once more
            return given.encode("utf-8", "surrogateescape").decode("utf-8")
        if sys.stdin is None:
            raise SourceError("--prompt -: standard input is closed")
        if sys.stdin.isatty():
            typer.echo("note: type the prompt, then press Ctrl-D on a line of its own", err=True)
        text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
        return text.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise SourceError(f"the prompt is not UTF-8 text: {error.reason} at character {error.start}") from None
