"""How long do we take to the loss that transformers with AdamW reaches in ten minutes?

    python benchmarks/time_to_loss.py --train train.txt --validation valid.txt

Both train the 6.76M shape of `gemmule bench train` from nothing, on the same prepared tokens and the same machine.
transformers: Gemma3ForCausalLM, compiled, AdamW, 32 x 256 tokens a step, bf16, warm-up and a cosine to a tenth over its
minutes, once for each rate of --rates. Gemmule: `gemmule train` with the settings of tinystories-cpu.toml and the same
batch, once for each of --budgets. Compiling and saving do not count on either side. `gemmule evaluate` judges all of
them on all of the validation text. Prints a table, and writes it as JSON. Forty minutes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plan import gemmule

ROOT = Path(__file__).parents[1]
SHAPE = (
    "model.hidden_size=256", "model.num_hidden_layers=6", "model.sliding_window_pattern=6", "model.head_dim=64",
    "model.intermediate_size=1024", "model.num_attention_heads=4", "model.num_key_value_heads=1",
    "model.query_pre_attn_scalar=64", "model.sliding_window=128",
)  # fmt: skip


def judged(model: Path, validation: Path) -> float:
    """Return the bits per byte of a model on a text."""
    answer = gemmule("evaluate", model, "--data", validation, "--json").splitlines()[-1]
    return float(json.loads(answer)["bits_per_byte"])


def train_transformers(job: dict[str, Any]) -> None:
    """Train the peer as long as the job says, and save it with our tokenizer: a model folder. In a process alone."""
    import torch
    import transformers

    from gemmule.data import open_dataset
    from gemmule.data.batches import PackedRows
    from gemmule.formats.config_json import write_config
    from gemmule.recipe import read_recipe
    from gemmule.train.run import Recipe

    dataset = open_dataset(Path(job["data"]))
    rows = PackedRows(dataset.train, job["context"], 0, False, dataset.tokenizer.bos_id)
    recipe = read_recipe(ROOT / "recipes/tinystories-cpu.toml", Recipe, list(SHAPE))
    config = recipe.model.replace(vocab_size=dataset.tokenizer.vocab_size)
    torch.manual_seed(0)
    table = transformers.Gemma3TextConfig(**write_config(config, dataset.tokenizer))
    model = transformers.Gemma3ForCausalLM._from_config(table, attn_implementation="sdpa").train()
    parameters, network = list(model.parameters()), torch.compile(model)
    optimizer = torch.optim.AdamW(parameters, lr=job["rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def gradients(number: int) -> float:
        tokens = rows.rows(number * job["batch"], job["batch"]).tokens
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return float(loss.detach())

    for _ in range(2):  # compiles
        gradients(0)
        optimizer.zero_grad()
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        factor = min(1.0, done / 0.02, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = job["rate"] * max(factor, 0.01)
        loss = gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, (time.monotonic() - began) / (60 * job["minutes"])
        if step % 50 == 0:
            print(f"transformers, rate {job['rate']}: step {step}, {done:.0%}, loss {loss:.3f}", file=sys.stderr)
    model.save_pretrained(job["out"])
    dataset.tokenizer.save(Path(job["out"]))
    print(json.dumps({"steps": step, "tokens": step * job["batch"] * job["context"]}))


def peer(job: dict[str, Any], validation: Path) -> dict[str, Any]:
    """Train transformers in a process of its own, and judge what came out."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    facts = json.loads(printed.splitlines()[-1])
    return {"side": "transformers", "rate": job["rate"], "minutes": job["minutes"], **facts} | {
        "bits_per_byte": judged(Path(job["out"]), validation)
    }


def ours(data: Path, minutes: float, batch: int, changes: list[str], out: Path, validation: Path) -> dict[str, Any]:
    """Train Gemmule for some minutes, and judge what came out."""
    recipe = ROOT / "recipes/tinystories-cpu.toml"
    settings = [
        *SHAPE, f"data.train={data}", "tokenizer.vocab_size=4096", f"train.minutes={minutes}",
        f"train.batch_size={batch}", "train.validate_every=1000000", "train.checkpoint_every=1000000",
        "train.validation_tokens=10000", "train.sample_tokens=8", *changes,
    ]  # fmt: skip
    gemmule("train", recipe, "--out", out, *(part for change in settings for part in ("--set", change)))
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    facts = {"steps": last["step"], "tokens": last["tokens"], "trained_seconds": last["seconds"]}
    return {"side": "gemmule", "minutes": minutes, **facts, "bits_per_byte": judged(out, validation)}


def main() -> None:
    """Prepare, train both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="a text file of stories")
    parser.add_argument("--validation", type=Path, help="another")
    parser.add_argument("--minutes", type=float, default=10, help="what transformers gets")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="its learning rates")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 2.5], help="our minutes")
    parser.add_argument("--batch", type=int, default=32, help="our rows of 256 tokens a step")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one of our settings")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/time_to_loss.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        train_transformers(options.job)
        return
    if not options.train or not options.validation:
        parser.error("--train and --validation are needed")
    from gemmule.bench.rounds import machine

    validation = options.validation.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        sources = (options.train.resolve(), "--validation", validation, "--separator", "<|endoftext|>")
        gemmule("prepare", *sources, "--vocab-size", 4096, "--out", data)
        runs = [
            ours(data, minutes, options.batch, options.set, folder / f"ours-{minutes}", validation)
            for minutes in options.budgets
        ]
        for rate in options.rates:
            job = {"rate": rate, "minutes": options.minutes, "data": str(data), "batch": 32, "context": 256}
            runs.append(peer(job | {"out": str(folder / f"peer-{rate}")}, validation))
    best = min(run["bits_per_byte"] for run in runs if run["side"] == "transformers")
    enough = [run["trained_seconds"] for run in runs if run["side"] == "gemmule" and run["bits_per_byte"] <= best]
    share = min(enough) / (60 * options.minutes) if enough else None
    found = {
        "benchmark": "time_to_loss", "machine": machine(), "changes": options.set, "runs": runs,
        "best_of_transformers": best, "share_of_its_time": share,
    }  # fmt: skip
    for run in runs:
        rate = f", rate {run['rate']}" if "rate" in run else ""
        print(f"{run['side']}, {run.get('trained_seconds', 60 * run['minutes']):.0f} s{rate}: ", end="")
        print(f"{run['bits_per_byte']:.4f} bits/byte after {run['steps']:,} steps")
    print(f"Gemmule needs {share:.0%} of the time" if share else "Gemmule needed more than any of its budgets")
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
