"""Training steps, side by side: the same shape, batch, random tokens, loss, clipping and AdamW."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from gemmule.bench.models import shape_of
from gemmule.bench.rounds import Answers, Effort, Progress, machine, peak, ratios, run_rounds, spread
from gemmule.bench.sides import Library, Side, check_library, our_side, peer_side
from gemmule.bench.stage import Made
from gemmule.data.batches import IGNORED, Batch
from gemmule.formats.config_json import write_config
from gemmule.model.config import Gemma3Config
from gemmule.recipe import check_recipe
from gemmule.runtime import ALONE, choose_device, choose_precision, reason_not_to_compile
from gemmule.train.loop import accumulate_gradients
from gemmule.train.run import Recipe, build, settle_attention

# 6.76M parameters; the shape in which the figures of docs/performance.md are given where no other is named.
DEFAULT: dict[str, Any] = {
    "data": {"train": "storybook"},
    "tokenizer": {"vocab_size": 4096},
    "model": {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
        "query_pre_attn_scalar": 64, "intermediate_size": 1024, "sliding_window": 128, "sliding_window_pattern": 6,
    },
    "train": {"steps": 1, "batch_size": 32, "context": 256, "compile": True, "attention": "auto"},
}  # fmt: skip


class Peer(NamedTuple):
    """Another way to train the same model."""

    program: str | None  # in peers/; None for Gemmule itself, otherwise set
    library: Library | None
    changes: dict[str, Any]  # of the job


_TRANSFORMERS = Library("transformers", "parity", "comparing with transformers")
_LITGPT = Library("litgpt", None, "comparing with litgpt")
PEERS: dict[str, Peer] = {
    "transformers": Peer("transformers_train", _TRANSFORMERS, {"compile": False}),
    "transformers-compiled": Peer("transformers_train", _TRANSFORMERS, {"compile": True}),
    "litgpt": Peer("litgpt_train", _LITGPT, {"compile": False}),
    "litgpt-compiled": Peer("litgpt_train", _LITGPT, {"compile": True}),
    "gemmule-eager": Peer(None, None, {"compile": False}),
    "gemmule-muon": Peer(None, None, {"muon": True}),
}


def compare_training(
    recipe: Recipe, peers: Sequence[str], effort: Effort, litgpt_python: str | None, progress: Progress
) -> dict[str, Any]:
    """Measure a recipe's training step beside the peers'; return the figures as plain numbers.

    Documents see each other and nothing is dropped out, for the peers know neither. Raises PeerError or MissingExtra
    where a peer is not installed, before anything is measured.
    """
    for name in peers:
        if (library := PEERS[name].library) is not None:
            check_library(library, litgpt_python)
    job = job_of(recipe, effort)
    sides = [our_side("gemmule", "train", job), *(_side(name, job, litgpt_python) for name in peers)]
    limits = peer_side("the machine's limits", "limits", job)
    answers = run_rounds([*sides, limits], effort.rounds, progress)
    limit = statistics.median(answer["flops"] for answer in answers.pop(limits.name))
    return summary(job, answers, limit)


def job_of(recipe: Recipe, effort: Effort) -> dict[str, Any]:
    """Return what every side is told."""
    settings, rates = recipe.train, recipe.optimizer
    device = choose_device(settings.device)
    model = shape_of(recipe).replace(dropout=0.0, attention_dropout=0.0)
    return {
        "recipe": recipe.replace(model=model).model_dump(mode="json", exclude_none=True),
        "config": write_config(model, None),
        "device": str(device),
        "precision": choose_precision(settings.precision, device),
        "batch": settings.batch_size,
        "micro_batch": settings.micro_batch_size or settings.batch_size,
        "context": settings.context,
        "compile": settings.compile,
        "muon": False,
        "seed": settings.seed,
        "optimizer": {
            "learning_rate": 2.5e-4, "betas": [rates.beta_1, rates.beta_2], "epsilon": rates.epsilon,
            "weight_decay": rates.weight_decay, "clip": rates.clip,
        },
        **effort._asdict(),
    }  # fmt: skip


def _side(name: str, job: dict[str, Any], litgpt_python: str | None) -> Side:
    peer = PEERS[name]
    changed = job | peer.changes
    if peer.program is None:
        return our_side(name, "train", changed)
    if peer.library is _LITGPT:
        assert litgpt_python is not None
        return peer_side(name, peer.program, changed, litgpt_python)
    return peer_side(name, peer.program, changed)


def make(job: dict[str, Any]) -> Made:
    """Return one step of `gemmule train` on random tokens: the loop's own, on a model built as a run builds it."""
    recipe, device, precision = (
        check_recipe(job["recipe"], Recipe, "benchmark"),
        torch.device(job["device"]),
        job["precision"],
    )
    compiled = job["compile"] and reason_not_to_compile(device) is None
    rates = recipe.optimizer
    muon = rates.replace(name="muon")
    adamw = rates.replace(name="adamw", learning_rate=job["optimizer"]["learning_rate"])
    settings = recipe.train.replace(compile=compiled, minutes=None)
    recipe = recipe.replace(train=settings, optimizer=muon if job["muon"] else adamw)
    recipe = settle_attention(recipe, device, precision, lambda _: None)
    draw = torch.Generator().manual_seed(job["seed"])
    parallel, updater = build(recipe, device, precision, ALONE)
    parallel.model.train()

    def step() -> float:
        tokens = torch.randint(recipe.model.vocab_size, (settings.batch_size, settings.context), generator=draw)
        batch = Batch(tokens, functional.pad(tokens[:, 1:], (0, 1), value=IGNORED), None)
        loss = accumulate_gradients(parallel, batch, batch.trained, 0, settings, precision)
        measured, figure = updater.norm(), loss.item()
        updater.update(1.0, measured)  # a GPU does this while the next step begins, for every side
        return figure

    return step, {
        "parameters": sum(parameter.numel() for parameter in parallel.model.parameters()),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "attention": recipe.train.attention,
    }


def flops_of_a_token(config: Gemma3Config, context: int) -> float:
    """Return the operations that training on one token of a full row takes at least: products, there and back.

    Attention is counted over the tokens that are visible; norms, rotary angles and the optimizer are not counted.
    """
    c = config
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * keys + 3 * c.intermediate_size)
    visible = 0.0
    for kind in c.layer_kinds:
        window = min(c.window(kind) or context, context)
        # The first tokens of a row see fewer than the others.
        visible += window - window * (window - 1) / 2 / context
    forward = 2 * (c.num_hidden_layers * block + c.vocab_size * c.hidden_size) + 4 * heads * visible
    return 3 * forward


def summary(job: dict[str, Any], answers: Answers, limit: float) -> dict[str, Any]:
    """Put the answers together: tokens a second of each side, ours over theirs, the share of the machine's limit."""
    tokens = job["batch"] * job["context"]
    rates = {
        name: [tokens / statistics.median(answer["seconds"]) for answer in rounds] for name, rounds in answers.items()
    }
    config = check_recipe(job["recipe"], Recipe, "benchmark").model
    flops = flops_of_a_token(config, job["context"])
    return {
        "bench": "train",
        "machine": machine(),
        "settings": {key: value for key, value in job.items() if key != "recipe"},
        "limit": {
            "what": f"matrix products in {job['precision']}, FLOP/s",
            "measured": limit,
            "flops_of_a_token": flops,
        },
        "sides": {
            name: {
                "tokens_per_second": spread(rates[name]),
                "share_of_limit": statistics.median(rates[name]) * flops / limit,
                "peak_memory": peak(rounds),
                "first_loss": rounds[0]["results"][0],
                "steps_measured": sum(len(answer["seconds"]) for answer in rounds),
                **{
                    key: rounds[0][key]
                    for key in ("parameters", "threads", "compiled", "attention", "versions")
                    if key in rounds[0]
                },
            }
            for name, rounds in answers.items()
        },
        "ratios": ratios(rates, "gemmule"),
    }
