"""`python -m gemmule` is the `gemmule` command."""

from gemmule.cli.main import main

main()
