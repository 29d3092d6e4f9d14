"""Does a run survive `kill -9` more than two hundred times, and end with the same bits?

    python benchmarks/chaos.py --kills 220

Takes the smallest recipe that has whatever a resumed run could get wrong (dropout, two optimizers, micro-batches,
validation, samples) through `resume_check.py`: a third of the kills come while a checkpoint is being written. Adds
the machine to its verdict, and writes it to benchmarks/results/chaos.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from harness.trials import machine

ROOT = Path(__file__).parents[1]
TINY = (
    "data.train=storybook:400", "tokenizer.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=3", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=16",
    "model.query_pre_attn_scalar=16", "model.sliding_window=8", "model.sliding_window_pattern=3", "model.dropout=0.1",
    "model.attention_dropout=0.1", "train.batch_size=8", "train.micro_batch_size=4", "train.context=32",
    "train.sample_tokens=12", "train.validation_tokens=2000", "train.compile=false", "train.device=cpu",
)  # fmt: skip


def main() -> None:
    """Run the check and keep its verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--steps", type=int, default=880)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/chaos.json")
    options = parser.parse_args()
    command = [sys.executable, str(ROOT / "benchmarks/resume_check.py"), str(ROOT / "recipes/story.toml"), "--json"]
    for name in ("kills", "steps", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    for setting in TINY:
        command += ["--set", setting]
    began = time.monotonic()
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    verdict = json.loads(ended.stdout.splitlines()[-1])
    result = {
        "benchmark": "chaos",
        "command": f"python benchmarks/chaos.py --kills {options.kills} --steps {options.steps} --seed {options.seed}",
        "same": verdict["same"],
        "steps": verdict["steps"],
        "kills": len(verdict["kills"]),
        "while_saving": verdict["while_saving"],
        "differences": verdict["differences"],
        "steps_seen_at_each_kill": verdict["kills"],
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": machine(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("same", "kills", "while_saving", "differences", "minutes")}))
    if not verdict["same"] or result["kills"] < 0.9 * options.kills:  # the last ones may find the run at its end
        sys.exit(1)


if __name__ == "__main__":
    main()
