"""How far is `gemmule plan` from what runs measure?

    python benchmarks/plan.py --train train.txt --validation valid.txt
    python benchmarks/plan.py --train train.txt --validation valid.txt --device cuda

Prepares the data of each case, trains it for some steps in a process of its own, and compares the plan that the run
made before its first step (RUN/plan.json) with the time of a step and the peak memory that it then measured. A second
plan after the run tells whether the machine has kept its speed. Prints a table, and writes it to
benchmarks/results/plan.json with the machine and versions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from harness.trials import machine

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """One recipe, changed to be over in a minute."""

    name: str
    recipe: str
    cpu: tuple[str, ...]  # overrides on a CPU alone
    steps: int


WIDE = (
    "model.hidden_size=256", "model.num_hidden_layers=6", "model.sliding_window_pattern=6", "model.head_dim=64",
    "model.intermediate_size=1024", "tokenizer.vocab_size=4096", "train.batch_size=32", "data.mask_documents=false",
    "model.num_attention_heads=4", "model.num_key_value_heads=1", "model.query_pre_attn_scalar=64",
)  # fmt: skip
# More ids than a small text can teach a tokenizer: the model has all of them, the tokenizer has some.
MANY_IDS = ("train.batch_size=8", "model.vocab_size=32768", "tokenizer.vocab_size=8192")
CASES = (
    Case("story", "story", (), 40),
    Case("story, not compiled", "story", ("train.compile=false",), 40),
    Case("tinystories-cpu", "tinystories-cpu", (), 25),
    Case("tinystories-90m, batch 8", "tinystories-90m", MANY_IDS, 10),
    Case("six layers of width 256, batch 32", "tinystories-cpu", WIDE, 12),
    Case("the same, blocks computed again", "tinystories-cpu", (*WIDE, "parallel.activation_checkpointing=full"), 12),
)


def gemmule(*arguments: object) -> str:
    """Run a command to its end, in a process of its own; return what it printed."""
    command = [sys.executable, "-m", "gemmule", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def vocabulary_of(case: Case) -> int:
    """Return the vocabulary of a case."""
    from gemmule.settings import read_recipe
    from gemmule.train.recipe import Recipe

    return read_recipe(ROOT / "recipes" / f"{case.recipe}.toml", Recipe, case.cpu).tokenizer.vocab_size


def prepare(case: Case, folder: Path, train: Path, validation: Path) -> Path:
    """Prepare the data of a case, once for each vocabulary."""
    size = vocabulary_of(case)
    out = folder / f"{'book' if case.recipe == 'story' else 'text'}-{size}"
    if not out.exists():
        sources = ("storybook:4000", "storybook:50") if case.recipe == "story" else (train, validation)
        gemmule("prepare", sources[0], "--validation", sources[1], "--vocab-size", size, "--out", out)
    return out


def run(case: Case, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Train a case and return what its plan.json says."""
    steps = case.steps if device == "cpu" else 200
    changes = [
        f"data.train={data}", f"train.device={device}", f"train.steps={steps}", f"train.log_every={-(-steps // 20)}",
        "train.validate_every=1000000", "train.validation_tokens=2000", "train.sample_tokens=8",
        "train.checkpoint_every=1000000",
    ]  # fmt: skip
    changes += case.cpu if device == "cpu" else [change for change in case.cpu if "batch" not in change]
    settings = [part for change in changes for part in ("--set", change)]
    recipe = out.with_suffix(".toml")
    text = (ROOT / "recipes" / f"{case.recipe}.toml").read_text(encoding="utf-8")
    recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("minutes", "validation ="))))
    gemmule("train", recipe, "--out", out, *settings)
    found: dict[str, Any] = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    options = ["--device", "cpu"] if device == "cpu" else []
    after = json.loads(gemmule("plan", recipe, *options, "--json", *settings))
    found["predicted"]["step_seconds_after_the_run"] = after["seconds"]["step"]
    return {"case": case.name, "changes": list(case.cpu)} | {
        key: found[key] for key in ("predicted", "measured", "off")
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="a text file of stories")
    parser.add_argument("--validation", type=Path, required=True, help="another")
    parser.add_argument(
        "--only", type=int, nargs="+", default=range(len(CASES)), help="cases by number; the JSON keeps the others"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")
    parser.add_argument("--data", type=Path, help="keep prepared data in this folder, and use what is there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan.json", help="the JSON")
    options = parser.parse_args()
    cases = [CASES[number] for number in options.only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = options.data or folder / "data"
        kept.mkdir(parents=True, exist_ok=True)
        data = [prepare(case, kept, options.train.resolve(), options.validation.resolve()) for case in cases]
        runs = [
            run(case, prepared, folder / f"run{number}", options.device)
            for number, (case, prepared) in enumerate(zip(cases, data, strict=True))
        ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": options.device, "machine": machine()}
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if all(before.get(key) == value for key, value in content.items()):
        rows = {found["case"]: found for found in [*before["runs"], *runs]}
        runs = [rows[case.name] for case in CASES if case.name in rows]
    print(f"{'case':36}{'ms/step, plan':>17}{'run':>8}{'off':>7}{'again':>8}{'MB, plan':>11}{'run':>7}{'off':>7}")
    for found in runs:
        plan, real, off = found["predicted"], found["measured"], found["off"]
        print(
            f"{found['case']:36}{1e3 * plan['step_seconds']:17,.0f}{1e3 * real['step_seconds']:8,.0f}"
            f"{off['step_seconds']:+7.0%}{1e3 * plan['step_seconds_after_the_run']:8,.0f}"
            f"{plan['peak_memory'] / 1e6:11,.0f}{real['peak_memory'] / 1e6:7,.0f}"
            f"{off['peak_memory']:+7.0%}"
        )
    content["runs"] = runs
    options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
