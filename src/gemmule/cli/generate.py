"""`gemmule generate MODEL`: continue a prompt, streaming."""

import json
import sys
from typing import Annotated, Literal

import typer

from gemmule.cli.screen import print_json


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest continuation.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Above 1 bolder, below 1 safer, 0 always the likeliest.")
    ] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest tokens; 0 among all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.000001, max=1, help="Choose among the likeliest that reach probability p.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0, max=0.999999, help="Leave out tokens below p times the likeliest's.")
    ] = 0.1,
    seed: Annotated[int | None, typer.Option(help="Repeats a continuation; without it each one is new.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    decoding: Annotated[
        Literal["auto", "plain", "native", "compiled"],
        typer.Option(help="How tokens are computed; compiled takes half a minute first. See docs/decoding.md."),
    ] = "auto",
    int8: Annotated[bool, typer.Option("--int8", help="Hold the weights in eight bits: less to read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of streaming text.")] = False,
) -> None:
    """Let a model continue a text.

    Examples:

        gemmule generate runs/story/model

        gemmule generate runs/story --prompt "Tom found a red" --temperature 0.5 --seed 7
    """
    import gemmule
    from gemmule.generate.decode import why_slow
    from gemmule.generate.weights import lay_out, quantise

    network, tokenizer = gemmule.load(model, device)
    network = lay_out(quantise(network) if int8 else network)
    if decoding == "auto" and (reason := why_slow(network)):
        typer.echo(f"note: {reason}; so tokens come more slowly than they could", err=True)
    text, tokens, finish = "", 0, None
    ahead = prompt  # shown with the first token, when it has not been refused
    for event in gemmule.generate(
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        decoding=decoding,
    ):
        text, tokens, finish = text + event.text, tokens + 1, event.finish
        if not as_json:
            sys.stdout.write(ahead + event.text)
            sys.stdout.flush()
            ahead = ""
    if as_json:
        print_json(json.dumps({"prompt": prompt, "text": text, "tokens": tokens, "finish": finish}))
    else:
        sys.stdout.write("\n")
