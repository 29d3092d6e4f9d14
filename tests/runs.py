"""Whole runs through the command line, small enough for tests: in this process, or in one of their own."""

import functools
import importlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from gemmule.cli.main import build_app, main
from gemmule.run_folder import read_json_lines

# Dropout, two optimizers and micro-batches: whatever a resumed run could get wrong is there.
RECIPE = """
[tokenizer]
vocab_size = 320

[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
query_pre_attn_scalar = 12
sliding_window = 8
sliding_window_pattern = 3
dropout = 0.1
attention_dropout = 0.1

[train]
steps = 12
batch_size = 8
micro_batch_size = 4
context = 32
log_every = 1
validate_every = 6
sample_prompts = ["Mia", "The owl saw"]
sample_tokens = 12
checkpoint_every = 3
device = "cpu"
precision = "fp32"

[optimizer]
name = "muon"
learning_rate = 0.01
adamw_learning_rate = 0.005
"""

TIMING = {"seconds", "tokens_per_second"}

# Dropout is drawn for each micro-batch by its first row, so that it depends on how the rows are cut.
STEADY = (
    "train.steps=20", "train.validate_every=20", "model.dropout=0.0", "model.attention_dropout=0.0",
    # At 0.01 AdamW makes 5e-6 of a rounding within 20 steps, whatever cuts the batch; at 0.003 it makes 2e-7.
    "optimizer.learning_rate=0.003",
)  # fmt: skip


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """Write so many different documents, with the separator of TinyStories between them."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            who, what = draw.choice(["Mia", "Tom", "The owl"]), draw.choice(["a red kite", "the key", "two eggs"])
            file.write(
                f"{who} {draw.choice(['found', 'saw'])} {what}, number {seed}-{number}. The end.\n<|endoftext|>\n"
            )
    return path


def write_recipe_file(folder: Path) -> Path:
    """Write training and validation text and the recipe `tiny.toml` that names them; return the recipe."""
    train, valid = write_text(folder / "train.txt", 400), write_text(folder / "valid.txt", 24, seed=1)
    recipe = folder / "tiny.toml"
    recipe.write_text(f'[data]\ntrain = "{train}"\nvalidation = "{valid}"\n{RECIPE}', encoding="utf-8")
    return recipe


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def gemmule(*arguments: object, given: bytes = b"") -> Ended:
    """Run a command in this process, with so much standard input; what would end in a traceback is raised."""
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def overrides(*changes: str) -> list[str]:
    """Return the words of a command line that change settings."""
    return [word for change in changes for word in ("--set", change)]


def final_weights(run: Path) -> bytes:
    """Return the file of the trained weights."""
    return (run / "model" / "model.safetensors").read_bytes()


def timeless_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what the clock decides."""
    lines = read_json_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_curve(run: Path, straight: Path) -> None:
    """Losses are equal within 1e-6, and as many targets were trained in each step."""
    one, other = (read_json_lines(folder / "metrics.jsonl") for folder in (run, straight))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in other]
    for key in ("loss", "val_loss"):
        values, wanted = ([line[key] for line in lines if key in line] for lines in (one, other))
        assert values == pytest.approx(wanted, rel=1e-6), key


class Death(NamedTuple):
    """A moment at which a process gets a signal, else `kill -9`: the n-th call of a function, before or after it."""

    function: str  # module:name
    call: int
    after: bool = False
    number: int = signal.SIGKILL

    def arm(self) -> None:
        """Lie in wait."""
        module_name, _, name = self.function.partition(":")
        module = importlib.import_module(module_name)
        original = getattr(module, name)
        calls = 0

        @functools.wraps(original)
        def deadly(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                os.kill(os.getpid(), self.number)
            result = original(*arguments, **options)
            if calls == self.call and self.after:
                os.kill(os.getpid(), self.number)
            return result

        setattr(module, name, deadly)


# What a run loads in the end, some of it only when it is needed.
PRELOADED = [
    "gemmule.cli.main", "gemmule.data.prepare", "gemmule.inference.engine", "gemmule.plan.prediction_log",
    "gemmule.train.run", "matplotlib.figure", "torch._dynamo", "torch.utils.tensorboard",
]  # fmt: skip


def start(
    *arguments: object,
    log: Path,
    death: Death | None = None,
    threads: int = 1,
    environment: Mapping[str, object] | None = None,
    constants: Mapping[str, object] | None = None,
) -> ForkServerProcess:
    """Start a command in a process of its own, which comes from a server that has loaded torch and more already.

    `constants` are values by "module:NAME" that the process has in place of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    words, variables = [str(word) for word in arguments], {k: str(v) for k, v in (environment or {}).items()}
    process = context.Process(target=_run, args=(words, log, death, threads, variables, constants or {}))
    process.start()
    return process


def start_world(
    size: int, *arguments: object, log: Path, machine: int | None = None, deaths: Mapping[int, Death] | None = None
) -> list[ForkServerProcess]:
    """Start a command as so many processes of one run, `machine` of them on each machine, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = machine or size
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            *arguments,
            log=log.with_name(f"{log.name}.{rank}"),
            death=(deaths or {}).get(rank),
            environment=place | {"RANK": rank, "LOCAL_RANK": rank % local},
        )
        for rank in range(size)
    ]


def _run(
    arguments: list[str],
    log: Path,
    death: Death | None,
    threads: int,
    environment: Mapping[str, str],
    constants: Mapping[str, object],
) -> None:
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:  # whose curves nobody looks at
        sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    import torch

    from gemmule.plan import devices

    devices._UNCACHED_ELEMENTS = 2**14  # for plans that nobody looks at, caches are not emptied before each matmul
    torch.set_num_threads(threads)
    for name, value in constants.items():
        setattr(importlib.import_module(name.partition(":")[0]), name.partition(":")[2], value)
    if death is not None:
        death.arm()
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
    sys.argv = ["gemmule", *arguments]
    main()


def kill_until_done(recipe: Path, run: Path, straight: Path, log: Path, most: int = 20) -> int:
    """Train a recipe straight, then again with kills on the way, each later than the one before it; return how many.

    What the last process leaves is then resumed to its end.
    """
    start("--version", log=log).join()  # the first process waits until the server of processes has loaded torch
    began = time.monotonic()
    process = start("train", recipe, "--out", straight, log=log)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0, log.read_text()
    for kills in range(most):
        process = start("train", recipe, "--out", run, "--resume", log=log)
        process.join(seconds * (kills + 1) / most)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    ended = gemmule("train", recipe, "--out", run, "--resume")
    assert ended.code == 0, ended.err
    return most


def workers(launcher: int) -> list[int]:
    """Return the processes that torchrun started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = dict[int, int]()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(name[5:]): int(child) for name in variables if name.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def wait_until(reached: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def steps_done(run: Path) -> int:
    """Return the last step that metrics.jsonl tells of."""
    lines = read_json_lines(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def number_printed_by(program: str) -> float:
    """Run a program in a fresh interpreter, as measuring peak memory needs; return the number that it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
