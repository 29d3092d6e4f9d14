"""Does `gemmule doctor` pass healthy models? Trains models of random shapes and seeds, and examines each.

    python benchmarks/doctor.py --models 20 [--train text.txt]

Every other model learns the storybook, the others the text of --train where one is given. A model that fails is a false
alarm: its checks are printed, and the exit code is 1.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.trials import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/doctor.json"


def shape(seed: int) -> dict[str, Any]:
    """Draw a shape that is a valid Gemma 3 and trains in a minute or two."""
    draw = random.Random(seed)
    heads, head_dim = draw.choice((2, 4, 6)), draw.choice((16, 32, 64))
    hidden = draw.choice([size for size in (48, 64, 96, 128) if size % heads == 0])
    layers = draw.choice((2, 3, 4, 6, 7))
    return {
        "tokenizer.vocab_size": draw.choice((500, 1000, 3200)),
        "model.hidden_size": hidden,
        "model.intermediate_size": hidden * draw.choice((2, 3, 4)),
        "model.num_hidden_layers": layers,
        "model.sliding_window_pattern": draw.randint(2, min(6, layers)),
        "model.num_attention_heads": heads,
        "model.num_key_value_heads": draw.choice([n for n in (1, 2, 3) if heads % n == 0]),
        "model.head_dim": head_dim,
        "model.query_pre_attn_scalar": draw.choice((head_dim, 2 * head_dim)),
        "model.sliding_window": draw.choice((8, 24, 64, 128)),
        "train.seed": seed,
        "train.context": draw.choice((64, 128, 256)),
        "train.batch_size": 16,
        "optimizer.name": draw.choice(("adamw", "muon")),
        "optimizer.learning_rate": 0.005,
    }


def examine(seed: int, steps: int, train: Path | None, folder: Path) -> dict[str, Any]:
    """Train the model of a seed, and return its shape, its loss and the checks that failed."""
    source = str(train) if train and seed % 2 else "storybook:4000"
    chosen = shape(seed)
    changes = chosen | {
        "data.train": source, "train.steps": steps, "train.minutes": "none", "train.validate_every": steps,
        "train.compile": "false", "train.sample_prompts": "[]", "train.attention": "block-local",
    }  # fmt: skip
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    gemmule = [sys.executable, "-m", "gemmule"]
    run = folder / str(seed)
    command = [*gemmule, "train", str(ROOT / "recipes/story.toml"), "--out", str(run), *options]
    trained = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if trained.returncode:
        sys.exit(f"seed {seed} could not be trained: {trained.stderr[-500:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    verdict = subprocess.run([*gemmule, "doctor", str(run), "--json"], stdout=subprocess.PIPE, text=True, check=False)
    findings = json.loads(verdict.stdout.splitlines()[-1])["findings"]
    failed = [finding for finding in findings if finding["verdict"] == "failed"]
    return {"seed": seed, "source": source, "shape": chosen, "loss": lines[-1]["val_loss"], "failed": failed}


def main() -> None:
    """Examine all models, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=Path, help="text that every other model learns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.models):
            found.append(examine(seed, options.steps, options.train, Path(folder)))
            print(f"seed {seed}: loss {found[-1]['loss']:.3f}, {len(found[-1]['failed'])} checks failed", flush=True)
    alarms = [one for one in found if one["failed"]]
    for one in found:
        one["source"] = Path(one["source"]).name
    result = {"benchmark": "doctor", "steps": options.steps, "models": found, "machine": machine()}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(alarms)} false alarms on {len(found)} models")
    for one in alarms:
        print(json.dumps(one))
    sys.exit(1 if alarms else 0)


if __name__ == "__main__":
    main()
