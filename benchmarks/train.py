"""Training throughput and peak memory of Gemmule and its peers.

    python benchmarks/train.py --peer transformers --peer transformers-compiled
    python benchmarks/train.py --recipe recipes/tinystories-90m-seed.toml --set train.batch_size=8 --peer transformers

Backends are measured in interleaved trials, each in its own process. gemmule-eager runs without `train.compile`,
gemmule-muon with Muon in place of AdamW; litgpt needs its own environment (benchmarks/README.md).
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("train", __doc__))
