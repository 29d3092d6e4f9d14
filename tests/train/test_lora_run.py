"""Runs that train an adapter: the base stays as it was, and resuming is exact."""

import shutil
from pathlib import Path

import pytest
import torch

import gemmule
import runs
from gemmule.errors import CheckpointError, OutputError, RecipeError
from gemmule.formats.adapter import base_sha256, read_adapter_config, weights_sha256
from gemmule.formats.folder import load_folder, save_folder
from gemmule.model.lora import LoRA, LoRALinear, lora_of
from gemmule.run_folder import read_json_lines
from gemmule.runtime import Runtime
from gemmule.settings import read_recipe
from gemmule.train.lora import LoRASettings, lora_of_settings, similarities
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import build
from gemmule.train.run import Outcome, run_recipe
from gemmule.train.start import open_start
from messages import logged
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

pytestmark = pytest.mark.usefixtures("without_plots")

RECIPE = """
[train]
start = "{start}"
steps = 6
batch_size = 4
micro_batch_size = 2
context = 32
log_every = 1
validate_every = 3
checkpoint_every = 3
sample_prompts = ["Mia"]
sample_tokens = 5
device = "cpu"
precision = "fp32"

[lora]
rank = 4
dropout = 0.1

[schedule]
name = "constant"
warmup_share = 0
"""


@pytest.fixture
def recipe(start: Path, tmp_path: Path) -> Path:
    """A recipe that trains an adapter on `start`."""
    train, valid = (runs.write_text(tmp_path / f"{name}.txt", 80, seed) for name, seed in (("new", 5), ("held", 6)))
    file = tmp_path / "lora.toml"
    file.write_text(f'[data]\ntrain = "{train}"\nvalidation = "{valid}"\n{RECIPE.format(start=start)}')
    return file


def train(file: Path, out: Path, *changes: str, resume: bool = False, allow: bool = False) -> Outcome:
    def sample(model: torch.nn.Module, _tokenizer: object, prompts: tuple[str, ...], *_: object) -> list[str]:
        assert not any(isinstance(module, LoRALinear) for module in model.modules())
        return [prompt + "!" for prompt in prompts]

    return run_recipe(read_recipe(file, Recipe, changes), out, resume, sample=sample, allow_changes=allow)  # type: ignore[arg-type]


def test_an_adapter_learns_and_its_base_does_not(recipe: Path, start: Path, tmp_path: Path) -> None:
    before = (start / "model.safetensors").read_bytes()
    out = tmp_path / "run"
    with logged() as messages:
        outcome = train(recipe, out)
    assert any("LoRA of rank 4 on 7 matrices a layer" in message for message in messages)
    assert (start / "model.safetensors").read_bytes() == before
    assert outcome.recipe.optimizer.learning_rate == 1e-3
    lines = read_json_lines(out / "metrics.jsonl")
    assert lines[-1]["val_loss"] < lines[2]["val_loss"]
    base, _ = load_folder(start)
    assert read_adapter_config(out / "adapter").base == str(start.resolve())
    assert base_sha256(out / "adapter") == weights_sha256(base)
    tokens = some_tokens(base.config, length=20)
    with torch.no_grad():
        wanted = gemmule.load(out / "model")[0](tokens)
        for place in (out, out / "adapter", out / "checkpoints" / "step-00000006"):
            assert greatest_difference(gemmule.load(place)[0](tokens), wanted) < 1e-5
        assert greatest_difference(base(tokens), wanted) > 1e-3
    assert lines[-1]["val_bits_per_byte"] < lines[2]["val_bits_per_byte"]
    changed = [
        n for n, p in gemmule.load(out / "model")[0].named_parameters() if not torch.equal(p, base.get_parameter(n))
    ]
    assert {name.split(".")[-2] for name in changed} >= {"query", "key", "value", "output", "gate", "up", "down"}
    assert not [name for name in changed if "norm" in name]


def test_checkpoints_have_no_copy_of_the_base(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    names = {file.name for file in folder.iterdir()}
    assert "model.safetensors" not in names
    assert "config.json" not in names
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"} <= names
    assert base_sha256(folder) == base_sha256(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("kind", ["", "lora.dora=true", "parallel.activation_checkpointing=full"])
def test_resuming_is_exact(kind: str, recipe: Path, tmp_path: Path) -> None:
    changes = (kind,) if kind else ()
    train(recipe, tmp_path / "straight", *changes)
    train(recipe, tmp_path / "stopped", *changes, "train.steps=3")
    train(recipe, tmp_path / "stopped", *changes, resume=True, allow=True)
    assert runs.final_weights(tmp_path / "stopped") == runs.final_weights(tmp_path / "straight")
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("straight", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    assert runs.timeless_metrics(tmp_path / "stopped")[-1] == runs.timeless_metrics(tmp_path / "straight")[-1]


def test_another_base_cannot_go_on(recipe: Path, start: Path, tmp_path: Path) -> None:
    own = shutil.copytree(start, tmp_path / "own")
    changes = (f"train.start={own}",)
    train(recipe, tmp_path / "run", *changes, "train.steps=3")
    model, tokenizer = load_folder(own)
    with torch.no_grad():
        model.norm.weight[0] += 0.5
    shutil.rmtree(own)
    own.mkdir()
    save_folder(model, tokenizer, own)
    with pytest.raises(
        CheckpointError, match=r"its adapter was trained on another base than train\.start leads to now"
    ):
        train(recipe, tmp_path / "run", *changes, resume=True, allow=True)


def test_frozen_weights_may_be_bf16(recipe: Path, start: Path, tmp_path: Path) -> None:
    outcome = train(recipe, tmp_path / "run", "train.precision=bf16")
    opened = open_start(outcome.recipe)
    assert opened is not None
    adapter = opened.adapter(outcome.recipe)
    model = build(outcome.recipe, Runtime(torch.device("cpu"), "bf16"), opened, adapter).parallel.model
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val_loss"] < lines[2]["val_loss"]
    # Merged with the base as it is stored, in fp32.
    assert {p.dtype for p in load_folder(tmp_path / "run" / "model")[0].parameters()} == {torch.float32}


def complaint(file: Path, *changes: str) -> str:
    with pytest.raises(RecipeError) as refused:
        read_recipe(file, Recipe, changes)
    return str(refused.value)


def test_settings_that_do_not_fit_are_named(recipe: Path, start: Path, tmp_path: Path) -> None:
    assert "train.start: name the MODEL that the adapter" in complaint(recipe, "train.start=none")
    assert 'optimizer.name = "muon": adapters are trained by adamw' in complaint(recipe, "optimizer.name=muon")
    assert "lora.dropout = 0.1: is for adapters; set lora.rank, too" in complaint(recipe, "lora.rank=none")
    assert "no such matrix; there are q_proj" in complaint(recipe, "lora.targets=['c_attn']")
    assert "needs train.precision" in complaint(recipe, "lora.base_precision=bf16")
    with pytest.raises(RecipeError, match="is no token of the model"):
        train(recipe, tmp_path / "run", "lora.token_rows=['<nothing of this kind>']")
    rate = read_recipe(recipe, Recipe, ["optimizer.learning_rate=0.5"]).optimizer.learning_rate
    assert rate == 0.5


def test_another_rank_is_another_run(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.steps=3")
    with pytest.raises(OutputError, match=r"lora\.rank is 8, was 4.*name another folder"):
        train(recipe, tmp_path / "run", "lora.rank=8", resume=True, allow=True)


def test_turn_tokens_that_no_text_has_taught_learn(start: Path) -> None:
    model, tokenizer = load_folder(start)
    turns = [tokenizer.start_of_turn_id, tokenizer.end_of_turn_id]
    assert None not in turns
    assert lora_of_settings(LoRASettings(rank=2), model, tokenizer).rows in ((), tuple(turns))
    with torch.no_grad():  # as where no gradient but the common one has reached them
        model.embedding.weight[turns] = model.embedding.weight[3] * torch.tensor([[1.0], [1.1]])
        model.embedding.weight[turns] += 0.001
    with logged() as messages:
        assert lora_of_settings(LoRASettings(rank=2), model, tokenizer).rows == tuple(turns)
    assert "the base never learned them" in messages[0]
    drawn = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embedding.weight[turns] = drawn
    assert lora_of_settings(LoRASettings(rank=2), model, tokenizer).rows == ()
    assert lora_of_settings(LoRASettings(rank=2, token_rows=("none",)), model, tokenizer).rows == ()
    named = LoRASettings(rank=2, token_rows=("<end_of_turn>", "<bos>"))
    assert lora_of_settings(named, model, tokenizer).rows == (tokenizer.end_of_turn_id, tokenizer.bos_id)


def test_similarity_is_that_of_the_nearest_other_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    assert similarities(rows, [0, 2]) == pytest.approx([0.5**0.5, 0.5**0.5])


def test_defaults_are_those_of_the_settings() -> None:
    config = tiny_config(vocab_size=380)
    settings = LoRASettings(rank=16, token_rows=("none",))
    model = lively_model(config)
    lora = lora_of_settings(settings, model, None)  # type: ignore[arg-type]
    assert (lora.rank, lora.alpha, len(lora.targets), lora.dropout) == (16, 32.0, 7, 0.0)
    assert lora_of(model) is None
    assert LoRA(16, 32.0).targets == lora.targets
