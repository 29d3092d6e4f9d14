"""Evaluation throughput of Gemmule and its peers: the loss of stories, each on its own.

    python benchmarks/evaluate.py --model runs/story/model --peer transformers

All compute in fp32 on the CPU, and tokenize; backends are measured in interleaved trials, each in its own process.
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("evaluate", __doc__))
