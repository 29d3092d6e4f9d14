"""What options of several commands have in common."""

import math
from collections.abc import Collection
from typing import Annotated, Literal

import typer

from gemmule.errors import UserError
from gemmule.fields import LARGEST_REQUEST_SEED

Temperature = Annotated[float, typer.Option(min=0, help="Softmax temperature; 0 is greedy decoding.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option(min=0.000001, max=1, help="Sample from the likeliest tokens that reach probability p.")
]
MinP = Annotated[
    float, typer.Option(min=0, max=0.999999, help="Drop tokens less likely than p times the likeliest; 0 is off.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Make tokens of prompt and reply less likely by a factor above 0; 1 is off.")
]
PresencePenalty = Annotated[
    float, typer.Option(min=-2, max=2, help="Subtract it from the logits of the reply's tokens.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(min=-2, max=2, help="Subtract it as often as a token occurs in the reply.")
]
SamplingSeed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_REQUEST_SEED, help="Seed of the sampling; random by default.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
DecodingOption = Annotated[
    Literal["auto", "plain", "native", "compiled"],
    typer.Option(help="Decoding backend; compiled takes half a minute to start. See docs/decoding.md."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="FOLDER", help="A LoRA adapter (PEFT) that is merged into MODEL (repeatable)."),
]
Int8Option = Annotated[bool, typer.Option("--int8", help="Quantize the weights to int8.")]


def finite(number: float | None) -> float | None:
    """Refuse inf and nan, which pass any test of a range."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


def adapters_of_one(adapters: list[str] | None, models: Collection[str]) -> tuple[str, ...]:
    """Return the adapters; UserError where they stand beside several models."""
    if adapters and len(models) > 1:
        raise UserError(f"--adapter {adapters[0]}: is for one MODEL; folders of adapters are MODELs, too: name them so")
    return tuple(adapters or ())


def refuse_others(context: typer.Context, option: str, allowed: Collection[str]) -> None:
    """Raise UserError for what was given beside an option that leaves it without effect."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in allowed and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise UserError(f"{option} leaves {parameter.opts[0]} without effect; give one of them")
