"""The settings of a recipe: what they may be, what is said where they are not, and what was meant by other names."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemmule.errors import RecipeError
from gemmule.fields import LARGEST_SEED, settings_of
from gemmule.runtime import seed_everything
from gemmule.settings import check_recipe, read_recipe
from gemmule.synonyms import SECTIONS, SYNONYMS
from gemmule.train.recipe import Recipe
from messages import logged
from runs import gemmule, overrides

SETTINGS = {setting.key: setting for setting in settings_of(Recipe)}
OPTIONAL = [key for key, setting in SETTINGS.items() if setting.kind.endswith(", or none")]
SMALLEST: dict[str, Any] = {"data": {"train": "a.txt"}, "train": {"steps": 1}}
# The words of pydantic's own messages.
JARGON = re.compile(r"[Ii]nput|valid |validation,|should|unable|parse|Value error|instance|pattern|extra")


def complaint(*changes: str, table: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(SMALLEST if table is None else table, Recipe, "x", changes)
    return str(caught.value).removeprefix("recipe x\n  ")


def with_value(key: str, value: object) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return SMALLEST | {section: SMALLEST.get(section, {}) | {name: value}}


WRONG = (True, -1, 0, 1.5, 3.0, float("nan"), float("inf"), 10**30, "word", "", " ", [], [1], ["x", 1], [[1]], {"a": 1})
WRONG += ("none", "null", "caf\udce9", "a\0b", -(10**30), float("-inf"), 1e-320, "x" * 100)


def refusal(table: dict[str, Any]) -> str | None:
    try:
        check_recipe(table, Recipe, "x")
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", SETTINGS)
def test_whatever_is_wrong_with_a_setting_is_said_in_our_words(key: str) -> None:
    messages = [message for value in WRONG if (message := refusal(with_value(key, value)))]
    assert len(messages) > 5
    for message in messages:
        head, *lines = message.split("\n  ")
        assert head.startswith("recipe x")
        assert any(line.startswith(key) for line in lines), lines
        for line in lines:
            assert not JARGON.search(line.replace("data.validation", "").partition(": ")[2]), line
        message.encode("utf-8")


# Values just outside of what each kind of number may be.
OUTSIDE = {
    "a whole number from 1 to 1,000,000,000": (0, 10**9 + 1),
    "a whole number from 0 to 1,000,000,000": (-1, 10**9 + 1),
    "a whole number from 1 to 1,048,576": (0, 2**20 + 1),
    "a whole number from 0 to 9,223,372,036,854,775,807": (-1, 2**63),
    "a whole number at least 1": (0, 2**53 + 1),
    "a whole number from 2 to 1,024": (1, 1025),
    "a number above 0 and below 1": (0, 1, "nan"),
    "a number above 0": (0, "inf", "nan"),
    "a number above 0 and at most 1": (0, 1.01, "nan"),
    "a number at least 0": (-1e-9, "inf", "nan"),
    "a number at least 0 and below 1": (-1e-9, 1, "nan"),
    "a number from 1 to 1e+30": (0.99, 1.1e30, "inf", "nan"),
    "a number from 1e-30 to 1e+30": (0, 9e-31, 1.1e30, "inf", "nan"),
    "a number from 0 to 1": (-1e-9, 1.01, "nan"),
    "a number from 0.6 to 1": (0.59, 1.01, "nan"),
}
NUMBERS = {key: setting.kind.removesuffix(", or none") for key, setting in SETTINGS.items() if "number" in setting.kind}


@pytest.mark.parametrize("key", sorted(NUMBERS.keys() - {"data.weights", "rewards.weights"}))
def test_numbers_out_of_range_end_the_command_with_2_and_one_sentence(
    key: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    for value in OUTSIDE[NUMBERS[key]]:
        ended = gemmule("train", tiny_recipe, *overrides(f"{key}={value}"), "--out", tmp_path / "run")
        assert ended.code == 2
        head, line, *rest = ended.err.splitlines()
        assert head == f"gemmule: recipe {tiny_recipe}"
        assert line.startswith(f"  {key} = ")
        assert "must be" in line
        assert rest == []
        assert not (tmp_path / "run").exists()


def test_the_largest_seed_is_taken_by_every_generator() -> None:
    seed_everything(check_recipe(SMALLEST, Recipe, "x", [f"train.seed={LARGEST_SEED}"]).train.seed)
    torch.Generator().manual_seed(LARGEST_SEED)
    np.random.SeedSequence([LARGEST_SEED, 0]).generate_state(1)


def test_mistakes_that_need_no_machine_come_together() -> None:
    wrong = ["train.precision=fp16", "train.device=gpu", "schedule.name=line", "optimizer.name=sgd", "train.stpes=1"]
    lines = complaint(*wrong, "train.compile=True", "optimizer.learning_rate=fast", "train", "train.steps.x=1").split(
        "\n  "
    )
    assert lines == [
        "recipe x: 9 problems",
        "--set train: write it as section.key=value, for instance --set train.steps=100",
        "--set train.steps.x=1: steps is a value, not a section",
        'train.compile = "True": must be true or false',
        "train.stpes = 1: no such setting; did you mean train.steps?",
        'optimizer.learning_rate = "fast": must be a number above 0',
        'train.device = "gpu": no such device; write auto, cpu, cuda, cuda:1 or mps',
        "train.precision = \"fp16\": Gemma 3's residual stream and post-norms exceed fp16's largest number, 65504; "
        "use bf16 or fp32",
        'optimizer.name = "sgd": no such optimizer; there are adamw, muon',
        'schedule.name = "line": no such schedule; there are cosine, wsd, constant',
    ]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps", "mps:0"])
def test_names_of_devices_are_not_judged_by_this_machine(device: str) -> None:
    assert check_recipe(SMALLEST, Recipe, "x", [f"train.device={device}"]).train.device == device


# What is set, and where it may be set back: none of these is the default.
GIVEN: dict[str, object] = {
    "data.validation": "v.txt", "data.weights": [1.0], "data.max_characters": 9, "data.keep_matching": "a",
    "data.drop_matching": "a", "data.near_duplicates": 0.8, "data.license": "mit", "tokenizer.path": "t",
    "model.size": "1b", "train.start": "m", "train.minutes": 3, "train.micro_batch_size": 1,
    "train.validation_tokens": 9, "train.early_stopping": 3, "lora.rank": 4, "lora.alpha": 8.0,
}  # fmt: skip


# What a setting needs beside it.
BESIDE = {"lora.rank": ["train.start=m"], "lora.alpha": ["train.start=m", "lora.rank=4"]}


def test_every_optional_setting_is_tried() -> None:
    assert set(GIVEN) == set(OPTIONAL)


@pytest.mark.parametrize("key", OPTIONAL)
def test_none_unsets_an_optional_setting(key: str) -> None:
    beside = BESIDE.get(key, [])
    unset = check_recipe(SMALLEST, Recipe, "x", beside)
    table = with_value(key, GIVEN[key])
    assert check_recipe(table, Recipe, "x", beside) != unset
    for word in ("none", "None"):
        assert check_recipe(table, Recipe, "x", [*beside, f"{key}={word}"]) == unset
        assert check_recipe(table, Recipe, "x", [*beside, f'{key}="{word}"']) == unset
        again = check_recipe(with_value(key, word), Recipe, "x", beside)
        assert again == unset
        section, _, name = key.partition(".")
        assert name not in getattr(again, section).model_fields_set


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("word", ["", '""', "null", " "])
def test_nothing_is_not_none(key: str, word: str) -> None:
    assert "none" in complaint(f"{key}={word}", table=with_value(key, GIVEN[key]))


def test_a_required_setting_cannot_be_unset() -> None:
    assert complaint("train.steps=none") == 'train.steps = "none": must be a whole number from 1 to 1,000,000,000'
    assert (
        complaint("data.train=none") == 'data.train = ["none"]: none is not a SOURCE; a file of that name is "./none"'
    )
    assert complaint('data.validation=["a", "none"]').endswith('none is not a SOURCE; a file of that name is "./none"')
    assert check_recipe(SMALLEST, Recipe, "x", ["data.validation=./none"]).data.validation == ("./none",)


def test_none_is_a_value_where_there_is_one_of_that_name() -> None:
    settings = check_recipe(SMALLEST, Recipe, "x", ["parallel.activation_checkpointing=none", "data.column=none"])
    assert (settings.parallel.activation_checkpointing, settings.data.column) == ("none", "none")


@pytest.mark.parametrize("name", ["2024", "3.10", "true", "2024-01-01", "inf", "1e5"])
def test_text_that_looks_like_a_number_is_text_where_text_is_wanted(name: str) -> None:
    settings = check_recipe(SMALLEST, Recipe, "x", [f"data.train={name}", f"tokenizer.path={name}"])
    assert (settings.data.train, settings.tokenizer.path) == ((name,), name)


@pytest.mark.parametrize("value", ["\n\n", '"\\n\\n"'])
def test_a_separator_of_line_ends_is_kept(value: str) -> None:
    assert check_recipe(SMALLEST, Recipe, "x", [f"data.separator={value}"]).data.separator == "\n\n"


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    """A recipe that validates on a text of its own."""
    path = tmp_path / "own.toml"
    path.write_text('[data]\ntrain = "a.txt"\nvalidation = "v.txt"\n[train]\nsteps = 1\n')
    return path


@pytest.mark.parametrize(
    ("changes", "validation", "told"),
    [
        ([], ("v.txt",), 0),
        (["data.holdout=0.5"], ("v.txt",), 0),
        (["data.train=a.txt"], ("v.txt",), 0),
        (["data.train=b.txt"], None, 1),
        (["data.train=b.txt", "data.validation=w.txt"], ("w.txt",), 0),
        (["data.train=b.txt", "data.validation=v.txt"], ("v.txt",), 0),
        (["data.train=b.txt", "data.validation=none"], None, 0),
    ],
)
def test_other_text_is_not_validated_on_that_of_the_recipe(
    own_text: Path, changes: list[str], validation: object, told: int
) -> None:
    said: list[str] = []
    assert read_recipe(own_text, Recipe, changes, warn=said.append).data.validation == validation
    assert len(said) == told
    assert all("data.holdout" in sentence and "--set data.validation=SOURCE" in sentence for sentence in said)


def test_a_library_is_warned_of_validation_that_is_left_out(own_text: Path) -> None:
    with logged() as messages:
        read_recipe(own_text, Recipe, ["data.train=b.txt"])
    assert "the data.validation of the recipe is left out" in messages[0]


@pytest.mark.parametrize("changes", [[], ["train.attention=folded"]])
def test_the_former_name_of_a_kernel_is_read_with_a_warning(tiny_recipe: Path, changes: list[str]) -> None:
    old = tiny_recipe.with_name("old.toml")
    old.write_text(tiny_recipe.read_text().replace("[train]", '[train]\nattention = "folded"'))
    with logged() as messages:
        assert read_recipe(old, Recipe, changes).train.attention == "block-local"
    assert set(messages) == {'train.attention = "folded" is now called "block-local", which is used'}


def test_the_commands_say_that_validation_is_left_out(tiny_recipe: Path, tmp_path: Path) -> None:
    text = tiny_recipe.parent / "valid.txt"
    change = overrides(f"data.train={text}")
    for command in (
        ["prepare", tmp_path / "nowhere.txt", "--recipe", tiny_recipe, "--out", tmp_path / "data"],
        ["plan", tiny_recipe, *change, "--device", "nothing"],
        ["train", tiny_recipe, *change, *overrides("train.device=mps:9"), "--out", tmp_path / "run"],
    ):
        ended = gemmule(*command)
        assert ended.code == 2  # for another reason, soon
        assert ended.err.startswith("note: data.train was changed, so the data.validation of the recipe is left out")


KNOWN_NAMES = {key.rpartition(".")[2] for key in SETTINGS}


def test_synonyms_lead_to_settings_that_exist() -> None:
    names = [name for synonym in SYNONYMS for name in synonym.names.split()]
    assert sorted(names) == sorted(set(names)), "each name once"
    assert not set(names) & KNOWN_NAMES, "what is a setting needs no synonym"
    for synonym in SYNONYMS:
        assert synonym.keys or synonym.hint
        assert set(synonym.keys) <= set(SETTINGS)
        for key in re.findall(r"\b(?:data|tokenizer|model|train|optimizer|schedule|parallel)\.\w+", synonym.hint):
            assert key in SETTINGS
        for name in synonym.names.split():
            sentence = complaint(f"train.{name}=1")
            wanted = f"did you mean {synonym.keys[0]}?" if synonym.keys else synonym.hint
            assert sentence.startswith(f"train.{name} = 1: no such setting; {wanted}")
    assert set(SECTIONS.values()) <= set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.LR", "optimizer.learning_rate"),
        ("train.block-size", "train.context"),
        ("model.block_size", "model.max_position_embeddings"),
        ("model.eps", "model.rms_norm_eps"),
        ("optimizer.eps", "optimizer.epsilon"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("train.vocab_size", "tokenizer.vocab_size"),
        ("train.stpes", "train.steps"),
        ("model.num_attn_heads", "model.num_attention_heads"),
        ("train.gradient_accumulation_steps", "train.micro_batch_size"),
        ("train.epochs", "train.steps"),
    ],
)
def test_a_name_of_other_programs_leads_to_ours(wrong: str, meant: str) -> None:
    assert f"no such setting; did you mean {meant}?" in complaint(f"{wrong}=1")


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ("train.zzz", "no such setting; train has steps, start, minutes, batch_size, micro_batch_size, context, seed"),
        ("zzz", "no such setting; a recipe has data, tokenizer, model, train, lora, optimizer, schedule, preferences"),
        ("train.wandb", "no such setting; did you mean tracking.to? (or the option --track; see docs/tracking.md)"),
        ("train.comet", "no such setting; there are TensorBoard, wandb, mlflow and trackio; see docs/tracking.md"),
        ("train.init_from", "no such setting; a run starts from new weights"),
        ("a.b.c", "no such section; a recipe has data, tokenizer"),
        ("trainer.steps", "no such section; did you mean train?"),
        ("modle.size", "no such section; did you mean model?"),
        ("lr_scheduler.name", "no such section; did you mean schedule?"),
    ],
)
def test_what_resembles_nothing_is_answered_with_what_there_is(wrong: str, advice: str) -> None:
    assert advice in complaint(f"{wrong}=1")


def test_advice_on_gradient_accumulation_and_epochs_says_how() -> None:
    assert "gradient accumulation follows from the two" in complaint("train.gradient_accumulation_steps=4")
    assert "epochs x tokens of the data / (train.batch_size x train.context)" in complaint("train.num_train_epochs=3")


def test_mistakes_are_reported_together_where_a_required_setting_is_one_of_them(tiny_recipe: Path) -> None:
    """Also combinations of the others, which only a section that is complete can be asked for."""
    mistakes = overrides("train.steps=-1", "train.device=gpu", "train.precision=fp16", "data.train=")
    lines = gemmule("train", tiny_recipe, *mistakes).err.splitlines()
    assert [line.split(" = ")[0].strip() for line in lines[-4:]] == [
        "data.train",
        "train.steps",
        "train.device",
        "train.precision",
    ]
