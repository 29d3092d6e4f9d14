"""lm_eval's own command, with our model and tasks: python -m gemmule.evaluate.lm_eval --model gemmule ...

lm_eval finds models in a table of its own and has no entry point for others, so that its command alone does not know
ours.
"""

import sys

from gemmule.errors import GemmuleError
from gemmule.evaluate.lm_eval.model import register
from gemmule.evaluate.lm_eval.run import TASKS


def main() -> None:
    """Run lm_eval's command line; a mistake of the user's in what is ours ends in one sentence."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        if len(sys.argv) > 2 and "--include_path" not in sys.argv:
            sys.argv += ["--include_path", str(TASKS)]
        cli_evaluate()
    except GemmuleError as error:
        sys.stderr.write(f"gemmule: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
