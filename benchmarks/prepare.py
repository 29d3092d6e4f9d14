"""Throughput and peak memory of preparing a corpus, of Gemmule and its peers; resume after kill -9.

    python benchmarks/prepare.py --text train.txt --megabytes 1000 --peer transformers --trials 1 --kills 1

Backends are measured in interleaved trials, each in its own process. With --kills, the same corpus is prepared once
more, the process group is killed at random times and resumed, and the bytes of the datasets are compared.
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("prepare", __doc__))
