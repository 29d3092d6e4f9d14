"""Measurement of Gemmule itself, in its own process: python -m harness.gemmule_runner WORK JOB."""

import importlib
import json
import sys

from gemmule.processes import prepare_process
from harness.runner import measure


def main() -> None:
    """Prepare the process as the command line does, and measure the work that it names."""
    prepare_process()
    measure(importlib.import_module(f"harness.{sys.argv[1]}").setup, json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
