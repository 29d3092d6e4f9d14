"""The seed's run on a GPU: 25,000 steps of 64 x 256 tokens, validated every 500, and its curve as a picture.

    PYTHONPATH=src python benchmarks/gpu_seed_run.py --train train.txt --validation valid.txt --out seed-run

Prepares the text, then trains recipes/tinystories-90m-seed.toml as it is but for what makes it fast: blocks compiled,
the fastest kernel of attention. The model has the seed's 32,768 ids; a small text teaches the tokenizer fewer. With
--minutes, steps are fewer where the device cannot do all of them in that time. `--device cpu --tiny` tries the program
itself. Leaves OUT/run (its loss.png is the curve) and OUT/result.json, and prints a table.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from gemmule.run_folder import read_json_lines

ROOT = Path(__file__).parents[1]
TINY = (
    "model.hidden_size=32", "model.head_dim=16", "model.intermediate_size=64", "model.query_pre_attn_scalar=16",
    "model.sliding_window=16", "model.vocab_size=600", "train.batch_size=4", "train.context=48", "train.steps=6",
    "train.validate_every=3", "train.sample_tokens=8",
)  # fmt: skip


def gemmule(*arguments: object) -> None:
    """Run a command to its end, in a process of its own; it speaks for itself."""
    subprocess.run([sys.executable, "-m", "gemmule", *map(str, arguments)], check=True)


def main() -> None:
    """Prepare, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="storybook:60000", help="a SOURCE of stories")
    parser.add_argument("--validation", default="storybook:500", help="another")
    parser.add_argument("--vocab-size", type=int, default=8192, help="ids that the tokenizer learns")
    parser.add_argument("--minutes", type=float, help="train no longer than that")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and a few steps, to try the program")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one more setting")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    began, ids = time.monotonic(), 500 if options.tiny else options.vocab_size
    data, run = options.out / "data", options.out / "run"
    sources = (options.train, "--validation", options.validation)
    gemmule("prepare", *sources, "--vocab-size", ids, "--out", data)
    changes = [
        f"data.train={data}", f"tokenizer.vocab_size={ids}", "model.vocab_size=32768", f"train.device={options.device}",
        "train.compile=true", "train.attention=auto", "train.validation_tokens=200000", "train.log_every=100",
        *([f"train.minutes={options.minutes}"] if options.minutes else []),
        *(TINY if options.tiny else ()), *options.set,
    ]  # fmt: skip
    recipe = ROOT / "recipes/tinystories-90m-seed.toml"
    gemmule("train", recipe, "--out", run, *(part for change in changes for part in ("--set", change)))
    lines = read_json_lines(run / "metrics.jsonl")
    validated = [line for line in lines if "val_loss" in line]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    result = {
        "benchmark": "gpu_seed_run", "device": options.device, "changes": changes, "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"], "training_seconds": lines[-1]["seconds"],
        "seconds_with_preparation": time.monotonic() - began,
        "tokens_per_second": lines[-1]["tokens"] / lines[-1]["seconds"],
        "best": min(validated, key=lambda line: line["val_loss"]), "last": validated[-1],
        "plan": {key: plan[key] for key in ("predicted", "measured", "off") if key in plan},
    }  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['steps']:,} steps, {result['tokens']:,} tokens in {result['training_seconds'] / 60:.1f} minutes")
    print(f"{result['tokens_per_second']:,.0f} tokens/s, with all that is done between steps left out")
    for name in ("best", "last"):
        line = result[name]
        figures = f"{line['val_loss']:.4f} nats per token, {line['val_bits_per_byte']:.4f} bits per byte"
        print(f"validation, {name}: {figures}, after step {line['step']:,}")
    print(f"the curve is {run / 'loss.png'}")


if __name__ == "__main__":
    main()
