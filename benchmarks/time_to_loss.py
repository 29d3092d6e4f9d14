"""How long do we take to the loss that transformers with AdamW reaches in ten minutes?

    python benchmarks/time_to_loss.py --train train.txt --validation valid.txt

Both train the 6.76M shape of `benchmarks/train.py` from nothing, on the same prepared tokens, 32 x 256 of them a step.
First their steps are timed interleaved, so that what slows the machine slows both. At that pace transformers
(Gemma3ForCausalLM, compiled, AdamW, bf16, warm-up and a cosine to a tenth) gets the steps of ten minutes, once for each
rate of --rates, and Gemmule (`gemmule train` with the settings of tinystories-cpu.toml) those of each share of the same
ten minutes. Compiling and saving do not count on either backend. `gemmule evaluate` judges all of them on all of the
validation text. Prints a table, and writes it as JSON. Forty-five minutes; ten of them where only our settings changed,
and --earlier names the result that has transformers' part.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
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
    """Train the peer for the steps of the job, and save it with our tokenizer: a model folder. In a process alone."""
    import torch
    import transformers

    from gemmule.data.dataset import open_dataset
    from gemmule.data.packing import PackedRows
    from gemmule.formats.config_json import write_config
    from gemmule.settings import read_recipe
    from gemmule.train.recipe import Recipe

    dataset = open_dataset(Path(job["data"]))
    rows = PackedRows(dataset.train, job["context"], 0, False, dataset.tokenizer.bos_id)
    recipe = read_recipe(ROOT / "recipes/tinystories-cpu.toml", Recipe, list(SHAPE))
    config = recipe.model.replace(vocab_size=dataset.tokenizer.vocab_size)
    torch.manual_seed(0)
    table = transformers.Gemma3TextConfig(**write_config(config, dataset.tokenizer))
    model = transformers.Gemma3ForCausalLM._from_config(table, attn_implementation="sdpa").train()
    parameters = list(model.parameters())
    network: Any = torch.compile(model)
    optimizer = torch.optim.AdamW(parameters, lr=job["rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def gradients(number: int) -> float:
        tokens = rows.rows(number * job["batch"], job["batch"]).tokens
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return float(loss.detach())

    for step in range(job["steps"]):
        done = step / job["steps"]
        factor = min(1.0, (step + 1) / (0.02 * job["steps"]), 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = job["rate"] * factor
        loss = gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"transformers, rate {job['rate']}: step {step} of {job['steps']}, loss {loss:.3f}", file=sys.stderr)
    model.save_pretrained(job["out"])
    dataset.tokenizer.save(Path(job["out"]))


def paces(batch: int) -> dict[str, Any]:
    """Time the steps of both backends interleaved; return the seconds per step, and the figures behind them."""
    from gemmule.settings import read_recipe
    from gemmule.train.recipe import Recipe
    from harness.train import compare_training
    from harness.trials import Budget

    changes = [*SHAPE, "tokenizer.vocab_size=4096", f"train.batch_size={batch}"]
    recipe = read_recipe(ROOT / "recipes/tinystories-cpu.toml", Recipe, changes)
    peers = ["transformers-compiled", "gemmule-muon"]
    found = compare_training(
        recipe, peers, Budget(3, 4.0, None, 3), None, lambda what, *_: print(what, file=sys.stderr)
    )
    tokens = batch * recipe.train.context
    rates = {name: backend["tokens_per_second"]["median"] for name, backend in found["backends"].items()}
    return {
        "gemmule": tokens / rates["gemmule-muon"],
        "transformers": tokens / rates["transformers-compiled"],
        "found": found,
    }


def peer(job: dict[str, Any], validation: Path) -> dict[str, Any]:
    """Train transformers in a process of its own, and judge what came out."""
    subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=True)
    loss = judged(Path(job["out"]), validation)
    return {"backend": "transformers", "rate": job["rate"], "steps": job["steps"], "bits_per_byte": loss}


def ours(data: Path, steps: int, batch: int, changes: list[str], out: Path, validation: Path) -> dict[str, Any]:
    """Train Gemmule for some steps, and judge what came out."""
    recipe = ROOT / "recipes/tinystories-cpu.toml"
    settings = [
        *SHAPE, f"data.train={data}", "tokenizer.vocab_size=4096", f"train.steps={steps}", "train.minutes=1000000",
        f"train.batch_size={batch}", "train.validate_every=1000000", "train.checkpoint_every=1000000",
        "train.validation_tokens=10000", "train.sample_tokens=8", *changes,
    ]  # fmt: skip
    gemmule("train", recipe, "--out", out, *(part for change in settings for part in ("--set", change)))
    return {"backend": "gemmule", "steps": steps, "bits_per_byte": judged(out, validation)}


def main() -> None:
    """Prepare, train both backends, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="a text file of stories")
    parser.add_argument("--validation", type=Path, help="another")
    parser.add_argument("--minutes", type=float, default=10, help="what transformers gets")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="its learning rates")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.225, 0.25], help="of them, for us")
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens per step")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one of our settings")
    parser.add_argument("--earlier", type=Path, help="a result of this machine: its pace and transformers' runs count")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/time_to_loss.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        train_transformers(options.job)
        return
    if not options.train or not options.validation:
        parser.error("--train and --validation are needed")
    validation, seconds = options.validation.resolve(), 60 * options.minutes
    if options.earlier:
        earlier = json.loads(options.earlier.read_text(encoding="utf-8"))
        if earlier["minutes"] != options.minutes or earlier["pace"]["found"]["settings"]["batch"] != options.batch:
            parser.error(f"{options.earlier}: was made with other --minutes or another --batch")
    else:
        earlier = {"pace": paces(options.batch), "runs": []}
    pace, peers = earlier["pace"], [run for run in earlier["runs"] if run["backend"] == "transformers"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        sources = (options.train.resolve(), "--validation", validation, "--separator", "<|endoftext|>")
        gemmule("prepare", *sources, "--vocab-size", 4096, "--out", data)
        runs = []
        for share in options.shares:
            steps = int(share * seconds / pace["gemmule"])
            run = ours(data, steps, options.batch, options.set, folder / f"ours-{share}", validation)
            runs.append(run | {"share": share})
        for rate in sorted({*options.rates} - {run["rate"] for run in peers}):
            job = {"rate": rate, "steps": int(seconds / pace["transformers"]), "batch": options.batch, "context": 256}
            peers.append(peer(job | {"data": str(data), "out": str(folder / f"peer-{rate}")}, validation))
    best = min(run["bits_per_byte"] for run in peers)
    enough = [run["share"] for run in runs if run["bits_per_byte"] <= best]
    runs += peers
    found = {
        "benchmark": "time_to_loss", "machine": pace["found"]["machine"], "minutes": options.minutes,
        "changes": options.set, "pace": pace, "runs": runs, "best_of_transformers": best,
        "share_of_its_time": min(enough, default=None),
    }  # fmt: skip
    for run in runs:
        what = f"rate {run['rate']}" if "rate" in run else f"{run['share']:.1%} of its time"
        print(f"{run['backend']}, {what}: {run['bits_per_byte']:.4f} bits/byte after {run['steps']:,} steps")
    print(f"Gemmule needs {min(enough):.1%} of the time" if enough else "Gemmule needs more than any of these shares")
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
