"""Training throughput: the same shape, batch, random tokens, loss, gradient clipping and AdamW."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from gemmule.data.batches import IGNORED, Batch
from gemmule.formats.config_json import write_config
from gemmule.model.config import Gemma3Config
from gemmule.runtime import Runtime, choose_device
from gemmule.settings import check_recipe
from gemmule.train.autotune import Trial, settle_precision, tune
from gemmule.train.loop import forward_backward
from gemmule.train.objectives import build_objective
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import build, resolve_vocabulary, trial_of
from harness.backends import Backend, Library, check_library, gemmule_backend, peer_backend
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, peak, ratios, run_trials, spread

# 6.76M parameters; the shape of the figures in docs/performance.md unless they name another.
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
    """Another implementation that trains the same model."""

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
    recipe: Recipe, peers: Sequence[str], budget: Budget, litgpt_python: str | None, progress: Progress
) -> dict[str, Any]:
    """Measure the training step of a recipe in every backend; return the figures as plain numbers.

    No document mask and no dropout, since the peers support neither. Raises PeerError or
    MissingExtra where a peer is not installed, before the first trial.
    """
    for name in peers:
        if (library := PEERS[name].library) is not None:
            check_library(library, litgpt_python)
    job = job_of(recipe, budget)
    backends = [gemmule_backend("gemmule", "train", job), *(_backend(name, job, litgpt_python) for name in peers)]
    limits = peer_backend("the machine's limits", "limits", job)
    measurements = run_trials([*backends, limits], budget.trials, progress)
    limit = statistics.median(one["flops"] for one in measurements.pop(limits.name))
    return summary(job, measurements, limit)


def job_of(recipe: Recipe, budget: Budget) -> dict[str, Any]:
    """Return the job of every backend."""
    settings, rates = recipe.train, recipe.optimizer
    device = choose_device(settings.device)
    recipe = resolve_vocabulary(recipe)
    model = recipe.model.replace(dropout=0.0, attention_dropout=0.0)
    recipe = recipe.replace(model=model, data=recipe.data.replace(mask_documents=False))  # as peers compute it
    return {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "config": write_config(model, None),
        "device": str(device),
        "precision": settle_precision(trial_of(recipe, device), settings.precision),
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
        **budget._asdict(),
    }  # fmt: skip


def _backend(name: str, job: dict[str, Any], litgpt_python: str | None) -> Backend:
    peer = PEERS[name]
    changed = job | peer.changes
    if peer.program is None:
        return gemmule_backend(name, "train", changed)
    if peer.library is _LITGPT:
        assert litgpt_python is not None
        return peer_backend(name, peer.program, changed, litgpt_python)
    return peer_backend(name, peer.program, changed)


def setup(job: dict[str, Any]) -> Workload:
    """Return one step of `gemmule train` on random tokens: functions of the loop on the model of a run."""
    recipe, device, precision = (
        check_recipe(job["recipe"], Recipe, "benchmark"),
        torch.device(job["device"]),
        job["precision"],
    )
    rates = recipe.optimizer
    muon = rates.replace(name="muon")
    adamw = rates.replace(name="adamw", learning_rate=job["optimizer"]["learning_rate"])
    settings = recipe.train.replace(compile=job["compile"], precision=precision, minutes=None)
    trial = Trial(recipe.model, job["micro_batch"], settings.context, False, device)
    settings = tune(trial, settings)
    recipe = recipe.replace(train=settings, optimizer=muon if job["muon"] else adamw)
    draw = torch.Generator().manual_seed(job["seed"])
    state = build(recipe, Runtime(device, precision))
    parallel, optimizers, objective = state.parallel, state.optimizers, build_objective(recipe)
    optimizers.set_learning_rate(1.0)
    parallel.model.train()

    def step() -> float:
        tokens = torch.randint(recipe.model.vocab_size, (settings.batch_size, settings.context), generator=draw)
        batch = Batch(tokens, functional.pad(tokens[:, 1:], (0, 1), value=IGNORED), None)
        loss = forward_backward(parallel, batch, batch.num_targets, 0, settings, objective)
        grad_norm, figure = optimizers.grad_norm(), loss.item()
        optimizers.clip_grad_norm(grad_norm)
        optimizers.step()  # a GPU does this while the next step begins, for every backend
        optimizers.zero_grad()
        return figure

    return step, {
        "parameters": sum(parameter.numel() for parameter in parallel.model.parameters()),
        "threads": torch.get_num_threads(),
        "compiled": settings.compile,
        "attention": recipe.train.attention,
    }


def flops_per_token(config: Gemma3Config, context: int) -> float:
    """Return the FLOPs per token of a full row: matmuls of the forward and backward passes.

    Attention is counted over visible keys; norms, rotary embeddings and the optimizer are not counted.
    """
    c = config
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * keys + 3 * c.intermediate_size)
    visible = 0.0
    for kind in c.layer_kinds:
        window = min(c.window(kind) or context, context)
        # The first tokens of a row see fewer keys than the others.
        visible += window - window * (window - 1) / 2 / context
    forward = 2 * (c.num_hidden_layers * block + c.vocab_size * c.hidden_size) + 4 * heads * visible
    return 3 * forward


def summary(job: dict[str, Any], measurements: Measurements, limit: float) -> dict[str, Any]:
    """Summarize the measurements: tokens per second of each backend, the speedup, the share of the machine's limit."""
    tokens = job["batch"] * job["context"]
    rates = {
        name: [tokens / statistics.median(one["seconds"]) for one in trials] for name, trials in measurements.items()
    }
    config = check_recipe(job["recipe"], Recipe, "benchmark").model
    flops = flops_per_token(config, job["context"])
    return {
        "bench": "train",
        "machine": machine(),
        "settings": {key: value for key, value in job.items() if key != "recipe"},
        "limit": {
            "what": f"matmuls in {job['precision']}, FLOP/s",
            "measured": limit,
            "flops_per_token": flops,
        },
        "backends": {
            name: {
                "tokens_per_second": spread(rates[name]),
                "share_of_limit": statistics.median(rates[name]) * flops / limit,
                "peak_memory": peak(trials),
                "first_loss": trials[0]["results"][0],
                "steps_measured": sum(len(one["seconds"]) for one in trials),
                **{
                    key: trials[0][key]
                    for key in ("parameters", "threads", "compiled", "attention", "versions")
                    if key in trials[0]
                },
            }
            for name, trials in measurements.items()
        },
        "ratios": ratios(rates, "gemmule"),
    }
