"""Is Gemmule right on this GPU, and how fast? Everything in one command of less than ten minutes.

    PYTHONPATH=src python benchmarks/gpu.py --out benchmarks/results/gpu.json

In this order: what the device can do at most; every kernel of attention against the reference; losses and gradients of
the seed's shape against fp32 and the CPU; training steps of that shape (64 x 256 tokens), with each kernel and
optimizer; CUDA graph replay against launched steps; decoding, one row and many; a profile of a step; transformers.
A part that fails or for which no time is left says so, and the others go on. The JSON is written anew after each part;
a table is printed at the end.
`--device cpu --tiny` tries the program itself where there is no GPU.
"""
# ruff: noqa: E402 - the process is prepared before torch is loaded

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmule.processes import prepare_process

prepare_process()  # as the command does

import torch

from decode import gemmule_backend
from gemmule.compiler import compile_block
from gemmule.formats.opening import open_model
from gemmule.inference.engine import stream_tokens
from gemmule.inference.runners import Decoding
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.attention import KERNELS, AttentionMask, packed_mask
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.runtime import autocast
from gemmule.settings import read_recipe
from gemmule.train import cuda_graph
from gemmule.train.loss import summed_loss
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import resolve_vocabulary
from harness.backends import peer_backend, run_backend
from harness.models import write_untrained
from harness.train import compare_training, flops_per_token, job_of, setup
from harness.trials import Budget, machine

ROOT = Path(__file__).parents[1]

TINY = (
    "model.hidden_size=32", "model.num_attention_heads=4", "model.head_dim=16", "model.intermediate_size=64",
    "model.query_pre_attn_scalar=16", "model.sliding_window=16", "model.num_hidden_layers=2",
    "model.sliding_window_pattern=2", "tokenizer.vocab_size=600", "train.batch_size=4", "train.context=48",
)  # fmt: skip
# (kernel, Muon, the seed's dropout: without it as with the peers)
TRAINING = (
    ("sdpa", False, False), ("block-local", False, False), ("flex", False, False), ("block-local", False, True),
    ("block-local", True, False),
)  # fmt: skip
ROWS = (1, 64, 256, 1024)


class Bench:
    """What all parts share: the shape, the device, how much is done, and what was found."""

    def __init__(self, device: str, tiny: bool, seconds: float) -> None:
        changes = [f"train.device={device}", "train.compile=true", *(TINY if tiny else ())]
        self.recipe = read_recipe(ROOT / "recipes/tinystories-90m-seed.toml", Recipe, changes)
        self.device, self.tiny, self.end = torch.device(device), tiny, time.monotonic() + seconds
        self.steps = 2 if tiny else 30
        self.found: dict[str, Any] = {"benchmark": "gpu", "device": device, "machine": machine(), "parts": {}}
        # FlexAttention has no backward pass on a CPU.
        self.kernels = [name for name in KERNELS if name != "flex" or self.device.type != "cpu"]

    def job(self, attention: str, muon: bool = False, dropout: bool = False) -> dict[str, Any]:
        """Return the job of `benchmarks/train.py` for one kernel and optimizer."""
        torch.compiler.reset()  # what is compiled too often in one process is run as it was written
        train = self.recipe.train.replace(attention=attention)
        job = job_of(self.recipe.replace(train=train), Budget(1, 0.0, self.steps, 3))
        if dropout:
            job["recipe"]["model"] = resolve_vocabulary(self.recipe).model.model_dump(mode="json", exclude_none=True)
        return job | {"muon": muon}

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def limits(bench: Bench) -> dict[str, Any]:
    """Measure large matmuls and memory bandwidth."""
    job = {"device": str(bench.device), "precision": "bf16"}
    answer = run_backend(peer_backend("limits", "limits", job))
    return {"products_tflops": answer["flops"] / 1e12, "reading_gb_per_second": answer["bytes"] / 1e9}


def kernels(bench: Bench) -> dict[str, Any]:
    """Compare each kernel and its gradients with the reference in fp32, by the largest difference."""
    size, worst = 64, dict[str, float]()
    scenes = {
        "causal": (300, None),
        "window": (300, 64),
        "long rows, window": (600, 64),
        "window, documents": (600, 64),
    }
    for scene, (length, reach) in scenes.items():
        now = torch.arange(length, device=bench.device)[None]
        marks = (now // 90).expand(2, -1) if "documents" in scene else None
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            torch.compiler.reset()
            inputs = [torch.randn(2, heads, length, size, device=bench.device) for heads in (4, 2, 2)]
            inputs = [x.to(dtype).requires_grad_() for x in inputs]
            exact = [x.detach().float().requires_grad_() for x in inputs]
            wanted = _there_and_back("reference", exact, AttentionMask(now, now, reach, marks, marks))
            for name in bench.kernels:
                got = _there_and_back(name, inputs, packed_mask(name, now, reach, marks))
                off = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
                worst[f"{name}, {scene}, {str(dtype).removeprefix('torch.')}"] = off
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}
    wrong = [case for case, off in worst.items() if not off <= allowed[case.rpartition(" ")[2]]]
    return {"off": worst, "allowed": allowed, "wrong": wrong}


def _there_and_back(name: str, inputs: list[torch.Tensor], seen: AttentionMask) -> list[torch.Tensor]:
    query, key, value = inputs
    kernel = torch.compile(KERNELS[name]) if name == "flex" else KERNELS[name]  # uncompiled it is another program
    mixed = kernel(query, key, value, seen, 0.125, 0.0)
    weights = torch.linspace(-1, 1, mixed.numel(), device=mixed.device, dtype=mixed.dtype).view_as(mixed)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, weights)]


def losses(bench: Bench) -> dict[str, Any]:
    """Compare loss and gradient of the whole model with fp32 on the CPU."""
    config = resolve_vocabulary(bench.recipe).model.replace(dropout=0.0, attention_dropout=0.0)
    context = bench.recipe.train.context
    tokens = torch.randint(config.vocab_size, (2, context), generator=torch.Generator().manual_seed(0))

    def measure(device: torch.device, kernel: str, half: bool, compiled: bool) -> tuple[float, float]:
        torch.compiler.reset()
        model = Gemma3(config, kernel)
        init_weights(model, 0)
        model.to(device)
        if compiled:
            for block in model.blocks:
                compile_block(block)
        here = tokens.to(device)
        with autocast(device, "bf16" if half else "fp32"):
            loss = model(here[:, :-1], output_head=summed_loss(here[:, 1:])) / here[:, 1:].numel()
        torch.autograd.backward(loss)
        norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.stack(norms).norm())

    exact = measure(torch.device("cpu"), "reference", False, False)
    cases = {
        f"{kernel}, {'bf16' if half else 'fp32'}{', compiled' * compiled}": measure(
            bench.device, kernel, half, compiled
        )
        for kernel in bench.kernels
        if kernel != "reference"
        for half, compiled in ((False, False), (True, False), (True, True))
    }
    off = {name: [abs(a / b - 1) for a, b in zip(case, exact, strict=True)] for name, case in cases.items()}
    allowed = {"fp32": 1e-4, "bf16": 1e-2}
    wrong = [name for name, both in off.items() if not max(both) <= allowed["bf16" if "bf16" in name else "fp32"]]
    return {"loss_and_gradient_norm": exact, "off": off, "allowed": allowed, "wrong": wrong}


def training(bench: Bench) -> dict[str, Any]:
    """Time training steps with each kernel and optimizer, and their share of the matmul throughput."""
    peak = bench.found["parts"]["limits"]["products_tflops"] * 1e12
    found = {}
    for kernel, muon, dropout in TRAINING:
        if kernel not in bench.kernels:
            continue
        job = bench.job(kernel, muon, dropout)
        step, facts = setup(job)
        assert step is not None
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        first, *_ = [step() for _ in range(job["warmup"])]
        started = time.perf_counter() - began
        times = [_timed(step) for _ in range(bench.steps)]
        seconds = statistics.median(times)
        tokens = job["batch"] * job["context"]
        work = flops_per_token(resolve_vocabulary(bench.recipe).model, job["context"]) * tokens
        found[f"{kernel}, {'muon' if muon else 'adamw'}{', dropout' * dropout}"] = {
            "step_milliseconds": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_utilisation": work / seconds / peak,
            "minutes_of_25000_steps": 25000 * seconds / 60,
            "first_loss": first,
            "seconds_to_warm_up": started,
            "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None,
            **facts,
        }
        del step
    return found


def recording(bench: Bench) -> dict[str, Any]:
    """Compare the losses of steps with dropout that are launched kernel by kernel with those of replayed ones."""

    def learn(warm: int) -> list[float]:
        before, cuda_graph.WARMUP_STEPS = cuda_graph.WARMUP_STEPS, warm
        try:
            step, _ = setup(bench.job("block-local", dropout=True))
            assert step is not None
            return [step() for _ in range(12)]
        finally:
            cuda_graph.WARMUP_STEPS = before

    launched, replayed = learn(99), learn(2)
    off = max(abs(a - b) for a, b in zip(launched, replayed, strict=True))
    return {"launched": launched, "replayed": replayed, "off": off, "allowed": 1e-2, "wrong": ["losses"] * (off > 1e-2)}


def _timed(step: Callable[[], float]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def profile(bench: Bench) -> dict[str, Any]:
    """Profile a step by kernel of the device."""
    step, _ = setup(bench.job("auto"))
    assert step is not None
    for _ in range(3):
        step()
    bench.wait()
    cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as recorded:
        began = time.perf_counter()
        for _ in range(3):
            step()
        bench.wait()
        wall = time.perf_counter() - began

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = [event for event in recorded.key_averages() if spent(event) > 0]
    events = [event for event in events if not cuda or event.device_type.name == "CUDA"]
    events.sort(key=spent, reverse=True)
    busy = sum(map(spent, events))
    return {
        "step_milliseconds": 1e3 * wall / 3,
        "busy_milliseconds": busy / 3e3,
        "kernels": [
            {
                "name": event.key[:100],
                "milliseconds": spent(event) / 3e3,
                "times": event.count / 3,
                "share": spent(event) / busy,
            }
            for event in events[:25]
        ],
    }


def peers(bench: Bench) -> dict[str, Any]:
    """Compare training with transformers, each in its own process."""
    budget = Budget(1, 0.0, bench.steps, 3)
    train = bench.recipe.train.replace(attention="auto")
    names = ["transformers", "transformers-compiled"]
    return compare_training(bench.recipe.replace(train=train), names, budget, None, lambda *_: None)


def decoding(bench: Bench) -> dict[str, Any]:
    """Continue one prompt and many at once, in bf16, the plain way and compiled."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_untrained(bench.recipe, Path(name) / "model")
        ways = [_greedy(Path(name) / "model", way, bench.device) for way in ("plain", "compiled")]
        found["the same tokens in fp32"] = ways[0] == ways[1]
        for way in ("compiled", "plain"):
            for rows in ROWS[: 2 if bench.tiny else None]:
                torch.compiler.reset()
                run = gemmule_backend(str(Path(name) / "model"), "bf16", way, rows, str(bench.device))
                tokens = 8 if bench.tiny else 128
                run(list(range(8, 24)), tokens)  # compiles, and records its graphs
                seconds = statistics.median(run(list(range(8, 24)), tokens))
                found[f"{way}, {rows} rows"] = {
                    "token_milliseconds": 1e3 * seconds,
                    "tokens_per_second": rows / seconds,
                }
                if time.monotonic() > bench.end:
                    return found
    return found


def _greedy(model: Path, way: Decoding, device: torch.device) -> list[list[int | None]]:
    network, _ = open_model(str(model), dtype=torch.float32)
    greedy, prompts = SamplingSettings(temperature=0), [[5, 6, 7, 8], [9, 10]]
    return list(stream_tokens(network.to(device), prompts, 24, frozenset(), greedy, decoding=way))


# (what it does, the seconds it should have)
PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "limits": (limits, 5),
    "kernels": (kernels, 5),
    "losses": (losses, 60),
    "training": (training, 60),
    "recording": (recording, 20),
    "decoding": (decoding, 60),
    "profile": (profile, 20),
    "peers": (peers, 180),
}


def table(found: dict[str, Any]) -> list[str]:
    """Print the figures, one per line."""
    parts, lines = found["parts"], []
    for name, part in parts.items():
        if "error" in part:
            lines.append(f"{name}: {part['error']}")
    for name in ("kernels", "losses", "recording"):
        if "wrong" in parts.get(name, {}):
            lines.append(f"{name}: {', '.join(parts[name]['wrong']) or 'all within what is allowed'}")
    if "products_tflops" in parts.get("limits", {}):
        lines.append(
            "limits: {products_tflops:,.1f} TFLOP/s, {reading_gb_per_second:,.0f} GB/s".format(**parts["limits"])
        )
    for name, figures in parts.get("training", {}).items():
        if isinstance(figures, dict):
            memory = figures["peak_gigabytes"]
            lines.append(
                f"training, {name}: {figures['step_milliseconds']:,.1f} ms per step, "
                f"{figures['tokens_per_second']:,.0f} tokens/s, "
                f"{figures['model_flops_utilisation']:.1%} of the matmul throughput, 25,000 steps in "
                f"{figures['minutes_of_25000_steps']:,.1f} minutes" + (f", {memory:.1f} GB" if memory else "")
            )
    for name, ratio in parts.get("peers", {}).get("ratios", {}).items():
        lines.append(f"{name}: Gemmule is {ratio['median']:.2f} x as fast")
    if "the same tokens in fp32" in parts.get("decoding", {}):
        lines.append(f"decoding, compiled gives the plain tokens: {parts['decoding']['the same tokens in fp32']}")
    for name, figures in parts.get("decoding", {}).items():
        if isinstance(figures, dict):
            lines.append(f"decoding, {name}: {figures['tokens_per_second']:,.0f} tokens/s")
    for kernel in parts.get("profile", {}).get("kernels", [])[:10]:
        lines.append(f"profile: {kernel['milliseconds']:8.2f} ms {kernel['share']:6.1%}  {kernel['name']}")
    return lines


def main() -> None:
    """Do one part after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the program")
    parser.add_argument("--seconds", type=float, default=540, help="begin no part for which there is no time")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts (limits always)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    options = parser.parse_args()
    bench = Bench(options.device, options.tiny, options.seconds)
    for name, (part, seconds) in PARTS.items():
        if name not in {"limits", *options.only}:
            continue
        began = time.monotonic()
        if bench.end - began < seconds:
            bench.found["parts"][name] = {"error": "no time was left for it"}
        else:
            try:
                bench.found["parts"][name] = part(bench)
            except Exception as error:
                traceback.print_exc()
                bench.found["parts"][name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        options.out.write_text(json.dumps(bench.found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(bench.found)))


if __name__ == "__main__":
    main()
