"""Decoding throughput and peak memory of Gemmule and its peers.

    python benchmarks/generate.py --model runs/story/model --peer transformers --peer llama.cpp

Greedy decoding of one prompt, batch 1; backends are measured in interleaved trials, each in its own process.
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("generate", __doc__))
