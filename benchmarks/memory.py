"""How much memory do preparing and training take, by the size of the corpus?

    python benchmarks/memory.py --megabytes 1000

Writes a synthetic corpus to a temporary folder, runs `gemmule prepare` and `gemmule train` on it in processes of their
own, and prints one JSON object with the peak resident memory of each, and the same for a corpus of one megabyte,
which is what Python, torch and the model take.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness.trials import machine

RECIPE = """
[data]
train = "{data}"

[model]
hidden_size = 128
intermediate_size = 512
num_hidden_layers = 6
num_attention_heads = 4
num_key_value_heads = 1
head_dim = 32
query_pre_attn_scalar = 32
sliding_window = 128

[train]
steps = {steps}
batch_size = 16
context = 256
device = "cpu"
precision = "fp32"
validation_tokens = 20000
sample_tokens = 20
"""


def write_corpus(path: Path, megabytes: int) -> None:
    """Write so many megabytes of documents, no two alike, of 30,000 words as unevenly frequent as a language's."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwyp"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(30_000)]
    frequencies = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    left = megabytes * 10**6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            text = " ".join(draw.choices(words, cum_weights=frequencies, k=draw.randint(50, 250)))
            left -= file.write(f"{text}.\n<|endoftext|>\n")


def measure(*arguments: object) -> dict[str, float]:
    """Run a gemmule command to its end; return its seconds and its peak resident memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gemmule", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"gemmule {arguments[0]} ended with status {status}")
    unit = 1 if platform.system() == "Darwin" else 1024  # what ru_maxrss counts, in bytes
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": round(usage.ru_maxrss * unit / 2**20, 1),
    }


def prepare_and_train(folder: Path, megabytes: int, vocab_size: int, steps: int) -> dict[str, Any]:
    """Make a corpus, prepare it, train on it; return what each command took."""
    folder.mkdir()
    write_corpus(folder / "corpus.txt", megabytes)
    recipe = folder / "memory.toml"
    recipe.write_text(RECIPE.format(data=folder / "data", steps=steps), encoding="utf-8")
    options = ["--vocab-size", vocab_size, "--out", folder / "data"]
    return {
        "megabytes": megabytes,
        "prepare": measure("prepare", folder / "corpus.txt", *options),
        "train": measure("train", recipe, "--out", folder / "run"),
    }


def main() -> None:
    """Measure, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            prepare_and_train(Path(folder) / str(size), size, options.vocab_size, options.steps)
            for size in sorted({1, options.megabytes})
        ]
    settings = {"vocab_size": options.vocab_size, "steps": options.steps}
    print(json.dumps({"runs": runs, **settings, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
