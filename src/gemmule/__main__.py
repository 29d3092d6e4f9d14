"""`python -m gemmule` is the `gemmule` command."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130 while it is being loaded, too."""
    try:
        from gemmule.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("gemmule: stopped\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
