"""What options of several commands have in common."""

import math

import typer


def finite(number: float | None) -> float | None:
    """Refuse inf and nan, which pass any test of a range."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number
