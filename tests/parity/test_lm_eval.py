"""The same folder through our adapter, through our evaluate and through lm_eval's own `hf`, in fp32 on the CPU."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from twin import MARKS

from gemmule.data.settings import DataSettings
from gemmule.evaluate.lm_eval.model import HarnessModel, register
from gemmule.evaluate.lm_eval.run import TASKS, evaluate_tasks, local_names
from gemmule.evaluate.text import score_text
from gemmule.formats.folder import load_folder
from gemmule.storybook import stories
from runs import gemmule

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("accelerate", reason="accelerate, which lm_eval's hf needs, is not installed")

pytestmark = [
    *MARKS,
    # Of lm_eval and the libraries that it loads.
    pytest.mark.filterwarnings("default::UserWarning", "default::ResourceWarning", "default::SyntaxWarning"),
]

ITEMS = 200

# Trained for seconds: enough to write words, and to prefer one choice to another.
RECIPE = """
[data]
train = "storybook:1500"
validation = "storybook:20"

[tokenizer]
vocab_size = 1200

[model]
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 7
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
query_pre_attn_scalar = 12
sliding_window = 32
sliding_window_pattern = 3
max_position_embeddings = 512

[train]
steps = 60
batch_size = 8
context = 256
validate_every = 60
checkpoint_every = 60
sample_prompts = []
device = "cpu"
precision = "fp32"

[optimizer]
name = "muon"
learning_rate = 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lm_eval")
    (place / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    ended = gemmule("train", place / "recipe.toml", "--out", place / "run")
    assert ended.code == 0, ended.err
    return place / "run" / "model"


def theirs(folder: Path, batch_size: int, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size, **options)


def ours(folder: Path, batch_size: int | None = None) -> Any:
    return register()(str(folder), device="cpu", batch_size=batch_size)


def requests(task: str, items: int = ITEMS) -> list[Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"items": items})
    loaded: Any = manager.load([task])["tasks"][task]
    loaded.set_config("num_fewshot", 0)
    loaded.build_all_requests(limit=items)
    return list(loaded.instances)


def choices(scores: Sequence[tuple[float, bool]]) -> list[int]:
    return [max(range(4), key=lambda choice: scores[first + choice][0]) for first in range(0, len(scores), 4)]


def test_rolling_texts_cost_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    asked = requests("storybook_perplexity")
    assert len(asked) == ITEMS
    mine = ours(folder).loglikelihood_rolling(asked, disable_tqdm=True)
    lengths = [len(ours(folder).tok_encode(each.args[0], add_special_tokens=False)) for each in asked]
    his = theirs(folder, 16, add_bos_token=False).loglikelihood_rolling(asked, disable_tqdm=True)
    assert max(abs(a - b) / n for a, b, n in zip(mine, his, lengths, strict=True)) < 1e-5
    # Our own evaluate, without what the ends of the stories cost.
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": each.args[0]}) + "\n" for each in asked), encoding="utf-8")
    network, tokenizer = load_folder(folder)
    scores = score_text(network.float(), tokenizer, DataSettings(train=(str(file),)))
    without_ends = -(scores.nats - scores.end_nats)
    assert max(abs(a - b) / n for a, b, n in zip(mine, without_ends, lengths, strict=True)) < 1e-5
    # By default `hf` puts a second bos before them: its prefix, and the one that the tokenizer adds.
    doubled = theirs(folder, 16).loglikelihood_rolling(asked, disable_tqdm=True)
    assert sum(mine) - sum(doubled) > 0.02 * sum(lengths)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_choices_are_the_same(folder: Path, batch_size: int) -> None:
    asked = requests("storybook_cloze")
    his = theirs(folder, batch_size).loglikelihood(asked, disable_tqdm=True)
    for size in (batch_size, None):
        mine = ours(folder, size).loglikelihood(asked, disable_tqdm=True)
        assert [a for a, _ in mine] == pytest.approx([b for b, _ in his], abs=1e-3)
        assert [a for _, a in mine] == [b for _, b in his]
        assert choices(mine) == choices(his)
    assert len(set(choices(his))) == 4


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("task", ["storybook_questions", "storybook_continuation"])
def test_replies_are_the_same(folder: Path, task: str, batch_size: int) -> None:
    asked = requests(task, ITEMS if task == "storybook_questions" else 20)
    mine = ours(folder, batch_size).generate_until(asked, disable_tqdm=True)
    assert mine == theirs(folder, batch_size).generate_until(asked, disable_tqdm=True)
    assert len(set(mine)) > 5


def test_a_context_that_is_too_long_loses_its_beginning_as_in_hf(folder: Path) -> None:
    asked = requests("storybook_cloze", 10)
    mine = register()(str(folder), device="cpu", max_length=40).loglikelihood(asked, disable_tqdm=True)
    his = theirs(folder, 4, max_length=40).loglikelihood(asked, disable_tqdm=True)
    assert [a for a, _ in mine] == pytest.approx([b for b, _ in his], abs=1e-3)
    rolling = requests("storybook_perplexity", 5)
    windows = register()(str(folder), device="cpu", max_length=40).loglikelihood_rolling(rolling, disable_tqdm=True)
    wanted = theirs(folder, 4, max_length=40, add_bos_token=False).loglikelihood_rolling(rolling, disable_tqdm=True)
    assert windows == pytest.approx(wanted, abs=1e-3)


def test_an_empty_context_is_bos(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("", "Once upon a time"), 0)]
    mine = ours(folder).loglikelihood(asked, disable_tqdm=True)
    assert mine[0][0] == pytest.approx(theirs(folder, 1).loglikelihood(asked, disable_tqdm=True)[0][0], abs=1e-4)
    whole = ours(folder).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("Once upon a time",), 0)])
    assert mine[0][0] == pytest.approx(whole[0], abs=1e-4)


def test_the_command_runs_every_local_task_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    ended = gemmule("evaluate", folder, "--tasks", "storybook", "--documents", 12, "--json")
    assert ended.code == 0, ended.err
    tasks = json.loads(ended.out)["tasks"]
    assert sorted([*tasks, "storybook"]) == sorted(local_names())
    assert all(task["items"] == 12 for task in tasks.values())
    texts = [each.text for each in stories(12, seed=101)]
    nats = -sum(ours(folder).loglikelihood_rolling(requests("storybook_perplexity", 12), disable_tqdm=True))
    size = sum(len(text.encode()) for text in texts)
    assert tasks["storybook_perplexity"]["bits_per_byte"] == pytest.approx(nats / size / 0.6931471805599453, rel=1e-5)


@pytest.mark.parametrize(("shots", "questions"), [(None, 1), (2, 3)])
def test_solved_examples_stand_before_the_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shots: int | None, questions: int
) -> None:
    prompts: list[str] = []

    def record(_: HarnessModel, asked: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts.extend(request.args[0] for request in asked)
        return ["nobody"] * len(asked)

    monkeypatch.setattr(HarnessModel, "generate_until", record)
    evaluate_tasks(str(folder), ["storybook_questions"], items=4, shots=shots)
    assert [prompt.count("Question:") for prompt in prompts] == [questions] * 4
    assert all(prompt.endswith("Answer:") for prompt in prompts)


def test_their_own_command_knows_our_model_and_tasks(folder: Path) -> None:
    arguments = ["--model", "gemmule", "--model_args", f"pretrained={folder}", "--tasks", "storybook_cloze"]
    command = [sys.executable, "-m", "gemmule.evaluate.lm_eval", *arguments, "--limit", "8", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|storybook_cloze|" in done.stdout


def test_their_models_are_known_beside_ours() -> None:
    program = (
        "from gemmule.evaluate.lm_eval.model import register; register();"
        "from lm_eval.api.registry import get_model; print(get_model('dummy').__name__, get_model('gemmule').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["DummyLM", "GemmuleLM"], done.stderr


def test_chats_are_refused_without_a_template(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf library is not installed")
    assert gemmule("export", folder, "--to", "gguf", "--out", tmp_path / "story.gguf").code == 0
    ended = gemmule("evaluate", tmp_path / "story.gguf", "--tasks", "storybook_questions", "--chat")
    assert ended.code == 2
    assert ended.err.strip().endswith(
        f"{tmp_path / 'story.gguf'}: the tokenizer has no chat template 'default'; it has none: leave chats out"
    )


def test_a_task_whose_data_cannot_be_had_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    ended = gemmule("evaluate", folder, "--tasks", "hellaswag")
    assert ended.code == 2
    assert "--tasks hellaswag: the data cannot be had (Couldn't reach 'Rowan/hellaswag' on the Hub)" in ended.err
    assert "tasks that need no network: storybook_cloze" in ended.err


def test_an_unknown_task_is_told_the_nearest(folder: Path) -> None:
    ended = gemmule("evaluate", folder, "--tasks", "storybook_clozes")
    assert ended.code == 2
    assert "did you mean storybook_cloze" in ended.err
