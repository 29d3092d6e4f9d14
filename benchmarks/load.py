"""Time from the start of a process to the first token, of Gemmule and its peers.

    python benchmarks/load.py --model runs/story/model --peer transformers

Files are in the page cache; backends are measured in interleaved trials, each in its own process.
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("load", __doc__))
