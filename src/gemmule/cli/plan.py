"""`gemmule plan RECIPE`: can my device do it, how long does it take, what does it cost?"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.screen import print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gemmule.plan.planner import Plan, Planner


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or the recipe.toml of a run folder.")],
    device: Annotated[
        str | None,
        typer.Option(help="h100, a100-40, 4090, m4, cpu ...  [default: what this machine has, or train.device = cpu]"),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many of the device, on as many machines as they need.")] = 1,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars an hour for one device.  [default: an assumed one]")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the plan last.")] = False,
) -> None:
    """Say what a recipe needs before it runs: memory, time, energy, cost, and how far the data goes.

    Runs the real model without numbers, so it needs no GPU and little memory, for any size. Ends with 0 also where the
    recipe does not fit; the first line, and "fits" of --json, tell.

    Examples:

        gemmule plan recipes/story.toml

        gemmule plan recipes/tinystories-90m.toml --device 4090

        gemmule plan recipes/tinystories-90m.toml --device h100 --gpus 64 --set parallel.strategy=hsdp --price 2.5
    """
    with _no_collecting():
        from rich.console import Console

        from gemmule.plan.planner import Planner
        from gemmule.plan.record import summary
        from gemmule.recipe import read_recipe
        from gemmule.train.run import Recipe

        planner = Planner(read_recipe(recipe, Recipe, overrides or []), device, gpus, price)
        found = planner.plan()
        _show(Console(stderr=as_json, highlight=False), str(recipe), planner, found)
        if as_json:
            print_json(json.dumps(summary(found)))


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Let garbage lie inside the block: looking for it among all that torch brings took a tenth of the command."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _show(console: "Console", name: str, planner: "Planner", found: "Plan") -> None:
    """Print the verdict, then the tables side by side where there is room, then what it all rests on."""
    from rich.columns import Columns

    number = f"{found.sharing.gpus:,} x " if found.sharing.gpus > 1 else ""
    how = f", {found.sharing.strategy}" if found.sharing.gpus > 1 else ""
    console.print(f"[bold]{name}[/] on {number}{found.device.title}, {found.precision}{how}")
    for sentence in _verdict(planner, found):
        console.print(sentence, soft_wrap=True)
    tables = [_parameters(found), _memory(found), _time(found), _budget(found)]
    if found.exchanged:
        tables.append(_exchange(found))
    console.print()
    console.print(Columns(tables, padding=(1, 4)))
    console.print("\n[bold]Assumed[/]")
    for sentence in found.assumptions:
        console.print(f"- {sentence}")


def _verdict(planner: "Planner", found: "Plan") -> list[str]:
    """Say whether it fits, and if not what would help most."""
    from gemmule.plan.planner import fewest_gpus, savings

    total, room = size(found.memory.total), size(found.capacity)
    if found.fits:
        return [f"[green]It fits[/]: {total} of {room} when memory is fullest, in {found.memory.moment}"]
    lines = [f"[red]It does not fit[/]: {total} are needed in {found.memory.moment}, a device has {room}"]
    for setting, saved in savings(planner, found.micro_batch)[:3]:
        lines.append(f"  --set {setting.replace(' ', '')} saves {size(saved)}")
    lasting = found.memory.classes["weights"] + found.memory.classes["optimizer"]
    if found.device.name != "cpu" and lasting > found.capacity:
        lines.append(f"  Weights and optimizer alone are too large for one: {_spread(fewest_gpus(planner))}")
    return lines


def _spread(gpus: int | None) -> str:
    if gpus is None:
        return "and so is one block that fsdp gathers; make the model smaller"
    return f"--gpus {gpus} --set parallel.strategy=fsdp would do, row by row"


def _table(title: str) -> "Table":
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column()
    table.add_column(justify="right")
    return table


def _parameters(found: "Plan") -> "Table":
    count, table = found.parameters, _table("Parameters")
    for label in ("embedding", "head", "attention", "mlp", "norms"):
        if number := getattr(count, label):
            table.add_row(label, f"{number:,}")
    table.add_row("[bold]all[/]", f"[bold]{count.total:,}[/]")
    table.add_row("FLOPs a token, forward", f"{found.flops_forward:.3g}")
    table.add_row("FLOPs a token, backward", f"{found.flops_backward:.3g}")
    table.add_row("FLOPs an update", f"{found.flops_update:.3g}")
    return table


def _memory(found: "Plan") -> "Table":
    table = _table("Memory of a device")
    for label, number in sorted(found.memory.classes.items(), key=lambda item: -item[1]):
        table.add_row(label, size(number))
    table.add_row("[bold]all[/]", f"[bold]{size(found.memory.total)}[/]")
    largest = f"{found.largest:,} rows" if found.largest else "none fits"
    table.add_row("micro-batch", f"{found.micro_batch:,} rows x {found.micro_batches}")
    table.add_row("largest that fits", largest)
    return table


def _time(found: "Plan") -> "Table":
    times, table = found.times, _table("Time")
    for label in ("forward", "backward", "update", "exchange"):
        if seconds := getattr(times, label):
            table.add_row(f"{label} of a step", duration(seconds))
    table.add_row("[bold]one step[/]", f"[bold]{duration(times.step)}[/]")
    table.add_row("tokens a second", f"{found.tokens_per_second:,.0f}")
    if found.utilisation is not None:
        table.add_row("model FLOPs utilisation", f"{found.utilisation:.0%}")
    table.add_row("a validation", duration(times.validation) if times.validation else "not known")
    table.add_row("steps", f"{found.steps:,}")
    table.add_row("[bold]the run[/]", f"[bold]{duration(3600 * found.hours)}[/]")
    return table


def _budget(found: "Plan") -> "Table":
    from gemmule.plan.planner import OPTIMAL

    table, text = _table("Data and cost"), found.text
    table.add_row("tokens of the run", f"{found.tokens:,}")
    table.add_row("tokens of the data", f"{text.tokens:,.0f}" if text.tokens else "not known")
    if text.tokens:
        table.add_row("epochs", f"{found.tokens / text.tokens:.2f}")
    per_parameter = found.tokens / found.parameters.body
    table.add_row("tokens a parameter", f"{per_parameter:.3g}")
    table.add_row(f"of the optimal {OPTIMAL:g}", f"{per_parameter / OPTIMAL:.2f} x")
    if found.device.watts:
        table.add_row("energy", f"{found.kilowatt_hours:,.2f} kWh")
        table.add_row("cost", f"{found.cost:,.2f} $")
    return table


def _exchange(found: "Plan") -> "Table":
    table = _table("Sent by a device in a step")
    for one, seconds in found.exchanged:
        table.add_row(f"{one.name} ({one.devices:,})", f"{size(one.bytes)}, {duration(seconds)}")
    return table


def size(number: float) -> str:
    """Write bytes for people, in powers of ten as devices are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}" if number < 100 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """Write seconds for people."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
