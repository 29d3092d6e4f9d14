"""Loss and gradients of whole models against the reference kernel, in fp32 and as they are written, over a grid.

Every cell of four rows runs uncompiled; compiled, which takes some ten seconds each, and of other numbers of rows so
many that each pair of values of two dimensions occurs together.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemmule.compiler import compile_block
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.runtime import autocast
from gemmule.train.loss import summed_loss

GRID: dict[str, tuple[Any, ...]] = {
    "kernel": ("block-local", "sdpa"),
    "precision": ("bf16", "fp32"),
    "rows": (1, 4, 8, 16, 64),
    "context": (64, 100, 256),
    "window": (32, 200, 7),
    "documents": (False, True),
    "head_dim": (64, 16, 256),
}
THREADS = (1, 2)
# Relative errors of gradients that rounding explains: some 3 % in bf16, which keeps 8 bits.
ALLOWED = {"bf16": 0.08, "fp32": 2e-4}


def cells() -> Iterator[dict[str, Any]]:
    for values in itertools.product(*GRID.values()):
        yield dict(zip(GRID, values, strict=True))


def pairwise() -> list[dict[str, Any]]:
    """Choose cells greedily until each pair of values of two dimensions, threads among them, is in one."""
    names = (*GRID, "threads")
    every = [cell | {"threads": threads} for cell in cells() for threads in THREADS if _is_compiled(cell)]

    def pairs(cell: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
        return {(a, cell[a], b, cell[b]) for a, b in itertools.combinations(names, 2)}

    left, chosen = set().union(*map(pairs, every)), list[dict[str, Any]]()
    while left:
        best = max(every, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def _is_compiled(cell: dict[str, Any]) -> bool:
    """Whether values are among the fewer ones that are also compiled."""
    return cell["rows"] != 4 and cell["window"] != 7 and cell["head_dim"] != 256


def computed(cell: dict[str, Any], kernel: str, precision: Any, compiled: bool) -> dict[str, Tensor]:
    """Return the loss and the gradients of a local and a global layer."""
    config = Gemma3Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, sliding_window_pattern=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=cell["head_dim"], query_pre_attn_scalar=48,
        sliding_window=cell["window"], initializer_range=0.1,
    )  # fmt: skip
    torch.compiler.reset()
    model = Gemma3(config, kernel).train()
    init_weights(model, 0)
    if compiled:
        for block in model.blocks:
            compile_block(block)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (cell["rows"], cell["context"] + 1), generator=draw)
    places = torch.arange(cell["context"]) + 11 * torch.arange(cell["rows"])[:, None]
    documents = (places // 40).int() if cell["documents"] else None
    with autocast(torch.device("cpu"), precision):
        loss = model(tokens[:, :-1], documents=documents, output_head=summed_loss(tokens[:, 1:], compiled))
    torch.autograd.backward(loss / tokens[:, 1:].numel())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


@functools.lru_cache(maxsize=1)
def reference(rows: int, context: int, window: int, documents: bool, head_dim: int) -> dict[str, Tensor]:
    """Return what is right, once for all kernels and number formats."""
    cell = {"rows": rows, "context": context, "window": window, "documents": documents, "head_dim": head_dim}
    return computed(cell, "reference", "fp32", compiled=False)


def complaints(cell: dict[str, Any], compiled: bool) -> list[str]:
    """Name what differs from the reference by more than rounding."""
    expected = reference(*(cell[name] for name in ("rows", "context", "window", "documents", "head_dim")))
    found = computed(cell, cell["kernel"], cell["precision"], compiled)
    assert found.keys() == expected.keys()
    errors = {name: ((found[name] - one).norm() / one.norm()).item() for name, one in expected.items()}
    allowed = ALLOWED[cell["precision"]]
    return [f"{name} {error:.2g}" for name, error in errors.items() if not error <= allowed]


def wrong_cells(chosen: list[dict[str, Any]], compiled: bool) -> dict[str, list[str]]:
    found = {json.dumps(cell): complaints(cell, compiled) for cell in chosen}
    return {cell: names for cell, names in found.items() if names}


@pytest.mark.slow
def test_every_kernel_gives_the_references_loss_and_gradients() -> None:
    every = [cell for cell in cells() if cell["rows"] == 4]
    every.sort(key=lambda cell: [cell[name] for name in ("context", "window", "documents", "head_dim")])
    assert wrong_cells([*every, *pairwise()], compiled=False) == {}


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS)
def test_compiled_kernels_give_the_references_loss_and_gradients(threads: int) -> None:
    chosen = [cell for cell in pairwise() if cell["threads"] == threads]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, json.dumps(chosen)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_the_compiled_cells_hold_every_pair_of_values() -> None:
    chosen = pairwise()
    fewer = {"rows": (1, 8, 16, 64), "window": (32, 200), "head_dim": (64, 16), "threads": THREADS}
    for (a, values), (b, others) in itertools.combinations((GRID | fewer).items(), 2):
        assert {(cell[a], cell[b]) for cell in chosen} == set(itertools.product(values, others))
    assert len(chosen) <= 14


def test_a_wrong_gradient_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmule.model import gemma3

    cell = {
        "kernel": "sdpa",
        "precision": "bf16",
        "rows": 2,
        "context": 64,
        "window": 32,
        "documents": True,
        "head_dim": 16,
    }
    assert complaints(cell, compiled=False) == []
    sdpa = gemma3.KERNELS["sdpa"]

    def wrong(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return sdpa(query, key.detach() + 0.5 * (key - key.detach()), *rest)

    monkeypatch.setitem(gemma3.KERNELS, "sdpa", wrong)
    assert any("attention.key" in name for name in complaints(cell, compiled=False))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(wrong_cells(json.loads(sys.argv[1]), compiled=True)))  # noqa: T201
