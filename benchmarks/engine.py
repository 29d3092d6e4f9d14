"""The engine: one row and many beside other engines, the time to a token, and whether company changes a reply.

    python benchmarks/engine.py --model runs/story --peer llama.cpp --peer transformers
    python benchmarks/engine.py --model runs/story --long 20000 --replies 100

Greedy decoding of the beginnings of stories, with 1 and with 16 rows in each engine, in interleaved trials, each in
its own process; prompts count. llama.cpp decodes all sequences in each llama_decode, with one thread and with all, with
and without flash attention, its KV cache in fp16 and fp32; transformers by its continuous batching and by its generate:
each trial takes the fastest. The ratios are those of our many rows over each other backend.

first_token_ms      until the first token of a reply to 200 tokens, when nothing else is done
gap_ms              between two tokens of eight replies while a prompt of --long tokens arrives: median and longest
same_replies        of --replies greedy replies, those whose tokens are the same alone and among 15 others; of each
                    backend, those of its replies that are ours
"""

import sys

from gemmule.processes import prepare_process
from harness.command import main

if __name__ == "__main__":
    prepare_process()  # as the command line does
    sys.exit(main("engine", __doc__))
