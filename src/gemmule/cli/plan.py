"""`gemmule plan RECIPE`: estimate peak memory, time and cost before a run."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.options import finite
from gemmule.cli.screen import note, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gemmule.plan.planner import Plan, Planner


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or the recipe.toml of a run folder.")],
    device: Annotated[
        str | None,
        typer.Option(
            help="Device, such as h100, a100-40, 4090, m4 or cpu.  [default: this machine's, or train.device = cpu]"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices, on as many nodes as they need.")] = 1,
    price: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="US dollars per hour and device.  [default: an assumed price]"),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the plan at the end.")] = False,
) -> None:
    """Estimate peak memory, time, energy, cost and epochs of a recipe before it runs.

    Traces the real model on fake tensors, so models of any size need no GPU and little memory. The exit code is 0 also
    where the recipe does not fit; see the first line, or "fits" with --json.

    Examples:

        gemmule plan recipes/story.toml

        gemmule plan recipes/tinystories-90m.toml --device 4090

        gemmule plan recipes/tinystories-90m.toml --device h100 --gpus 64 --set parallel.strategy=hsdp --price 2.5
    """
    with _garbage_collector_off():
        from rich.console import Console

        from gemmule.plan.planner import planner_of
        from gemmule.plan.prediction_log import summary
        from gemmule.settings import read_recipe
        from gemmule.train.recipe import Recipe
        from gemmule.train.start import open_start

        settings = read_recipe(recipe, Recipe, overrides or [], warn=note)
        start = open_start(settings)
        planner = planner_of(settings if start is None else start.adopt(settings), device, gpus, price)
        found = planner.plan()
        _show(Console(stderr=as_json, highlight=False, emoji=False), str(recipe), planner, found)
        if as_json:
            print_json(summary(found))


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Disable the garbage collector inside the block; with torch loaded it took a tenth of the command's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _show(console: "Console", name: str, planner: "Planner", found: "Plan") -> None:
    """Print whether it fits, then the tables, side by side where the width allows, then the assumptions."""
    from rich.columns import Columns

    number = f"{found.sharding.gpus:,} x " if found.sharding.gpus > 1 else ""
    strategy = f", {found.sharding.strategy}" if found.sharding.gpus > 1 else ""
    console.print(f"[bold]{name}[/] on {number}{found.device.title}, {found.precision}{strategy}")
    for sentence in _verdict(planner, found):
        console.print(sentence, soft_wrap=True)
    tables = [_parameters(found), _memory(found), _time(found), _budget(found)]
    if found.collectives:
        tables.append(_communication(found))
    console.print()
    console.print(Columns(tables, padding=(1, 4)))
    console.print("\n[bold]Assumptions[/]")
    for sentence in found.assumptions:
        console.print(f"- {sentence}")


def _verdict(planner: "Planner", found: "Plan") -> list[str]:
    """Return whether it fits, and otherwise the settings that save most memory."""
    from gemmule.plan.planner import fewest_gpus, savings

    total, room = size(found.memory.total), size(found.capacity)
    if found.fits:
        return [f"[green]Fits[/]: peak memory {total} of {room}, in {found.memory.phase}"]
    lines = [f"[red]Does not fit[/]: peak memory {total}, in {found.memory.phase}; the device has {room}"]
    for saving in savings(planner, found.micro_batch, found.largest)[:3]:
        lines.append(f"  --set {saving.setting} saves {size(saving.bytes)}" + (" and fits" if saving.fits else ""))
    lasting = found.memory.classes["weights"] + found.memory.classes["optimizer"]
    if found.device.name != "cpu" and lasting > found.capacity:
        lines.append(f"  Weights and optimizer state exceed one device; {_more_gpus(planner, fewest_gpus(planner))}")
    return lines


def _more_gpus(planner: "Planner", gpus: int | None) -> str:
    if gpus is None:
        return "one block, gathered by fsdp, also does: use a smaller model"
    options = f"--gpus {gpus} --set parallel.strategy=fsdp --set train.micro_batch_size=1"
    if planner.recipe.train.batch_size % gpus:
        options += f" --set train.batch_size={gpus}"
    return f"use {options}"


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
    for label in ("embedding", "head", "attention", "MLP", "norms"):
        if number := getattr(count, label.lower()):
            table.add_row(label, f"{number:,}")
    table.add_row("[bold]total[/]", f"[bold]{count.total:,}[/]")
    table.add_row("FLOPs per token, forward", f"{found.flops_forward:.3g}")
    table.add_row("FLOPs per token, backward", f"{found.flops_backward:.3g}")
    if found.flops_optimizer:  # Muon's matmuls; AdamW has none
        table.add_row("FLOPs per optimizer step", f"{found.flops_optimizer:.3g}")
    return table


def _memory(found: "Plan") -> "Table":
    table = _table("Peak memory per device")
    for label, number in sorted(found.memory.classes.items(), key=lambda item: -item[1]):
        table.add_row(label, size(number))
    table.add_row("[bold]total[/]", f"[bold]{size(found.memory.total)}[/]")
    table.add_row("micro-batch size", f"{found.micro_batch:,}")
    table.add_row("largest that fits", f"{found.largest:,}" if found.largest else "none")
    table.add_row("gradient accumulation", f"{found.micro_batches:,}")
    return table


def _time(found: "Plan") -> "Table":
    times, table = found.times, _table("Time")
    table.add_row("forward", duration(times.forward))
    table.add_row("backward", duration(times.backward))
    table.add_row("optimizer", duration(times.optimizer))
    if times.communication:
        table.add_row("exposed communication", duration(times.communication))
    table.add_row("[bold]step[/]", f"[bold]{duration(times.step)}[/]")
    table.add_row("tokens per second", f"{found.tokens_per_second:,.0f}")
    if found.mfu is not None:
        table.add_row("model FLOPs utilization", f"{found.mfu:.0%}")
    table.add_row("validation, each", duration(times.validation) if times.validation else "unknown")
    table.add_row("steps", f"{found.steps:,}")
    table.add_row("[bold]run[/]", f"[bold]{duration(3600 * found.hours)}[/]")
    return table


def _budget(found: "Plan") -> "Table":
    from gemmule.plan.planner import COMPUTE_OPTIMAL

    table, dataset = _table("Data and cost"), found.dataset
    table.add_row("training tokens", f"{found.tokens:,}")
    table.add_row("dataset tokens", f"{dataset.tokens:,.0f}" if dataset.tokens else "unknown")
    if dataset.tokens:
        table.add_row("epochs", f"{found.tokens / dataset.tokens:.2f}")
    per_parameter = found.tokens / found.parameters.body
    table.add_row("tokens per parameter", f"{per_parameter:.3g}")
    table.add_row(f"compute-optimal ({COMPUTE_OPTIMAL:g})", f"{per_parameter / COMPUTE_OPTIMAL:.2f} x")
    if found.device.watts:
        table.add_row("energy", f"{found.kilowatt_hours:,.2f} kWh")
        table.add_row("cost", f"${found.cost:,.2f}")
    return table


def _communication(found: "Plan") -> "Table":
    table = _table("Communication per device and step")
    for one, seconds in found.collectives:
        table.add_row(f"{one.name} ({one.devices:,} GPUs)", f"{size(one.bytes)}, {duration(seconds)}")
    return table


def size(number: float) -> str:
    """Format bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}" if number < 100 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """Format seconds, or h:mm:ss from 100 s."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
