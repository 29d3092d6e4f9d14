"""Decoding: time per token of Gemmule, llama.cpp and transformers, and the share of the memory bandwidth.

    python benchmarks/decode.py --model MODEL --out benchmarks/results/decode.json

MODEL is a model folder or .gguf file. Each backend is a process of its own that keeps the model open; in each trial all
continue the same prompt greedily, one after the other (A B C A B C ...). Prints, and writes to --out, one JSON object:
for each backend the median time per token, the share of the measured read bandwidth (weights read once a token), peak
memory, and the ratios. With --loading, the startup of the commands is timed, too. Many rows are measured by
benchmarks/engine.py, a GPU by benchmarks/gpu.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmule.inference.runners import Decoding

PROMPT = "Once upon a time there was a little fox who lived at the edge of a wood."

# Continue a prompt of ids by so many tokens; return the seconds of each token after the first.
Backend = Callable[[list[int], int], list[float]]


def gemmule_backend(
    model: str, precision: str, decoding: "Decoding", rows: int = 1, device: str = "cpu", threads: int | None = None
) -> Backend:
    """Open a model in Gemmule in fp32, bf16 or int8, and decode `rows` equal prompts side by side."""
    import torch

    from gemmule.formats.opening import open_model
    from gemmule.inference.engine import stream_tokens
    from gemmule.inference.huge_pages import move_to_huge_pages
    from gemmule.inference.quantize import quantize
    from gemmule.inference.sampling import SamplingSettings

    torch.set_num_threads(threads or torch.get_num_threads())
    network, _ = open_model(model, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    network = quantize(network) if precision == "int8" else network.to(device)
    network = move_to_huge_pages(network)

    def run(ids: list[int], tokens: int) -> list[float]:
        greedy, moments = SamplingSettings(temperature=0), []
        for _ in stream_tokens(network, [ids] * rows, tokens, frozenset(), greedy, decoding=decoding):
            moments.append(time.perf_counter())
        return [after - before for before, after in pairwise(moments)]

    return run


def llama_cpp_backend(path: str, threads: int) -> Backend:
    """Open a .gguf file in llama.cpp, through its C functions alone."""
    import ctypes

    import llama_cpp
    import numpy as np

    library = llama_cpp.llama_cpp
    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    # Weights of eight bits rearranged for AMX crash llama.cpp on some virtual machines.
    parameters.use_extra_bufts = not path.endswith("q8_0.gguf")
    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    model = library.llama_model_load_from_file(path.encode(), parameters)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def run(ids: list[int], tokens: int) -> list[float]:
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch = len(ids) + tokens, max(512, len(ids))
        options.n_threads = options.n_threads_batch = threads
        context = library.llama_init_from_model(model, options)
        moments, chunk = [], ids
        for _ in range(tokens):
            held = (library.llama_token * len(chunk))(*chunk)  # until it was decoded: the batch is a pointer to it
            assert library.llama_decode(context, library.llama_batch_get_one(held, len(held))) == 0
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (size,))
            chunk = [int(logits.argmax())]
            moments.append(time.perf_counter())
        library.llama_free(context)
        return [after - before for before, after in pairwise(moments)]

    run.silent = silent  # type: ignore[attr-defined]  # C keeps a pointer to it
    return run


def transformers_backend(folder: str, threads: int) -> Backend:
    """Open a model folder in transformers in bf16; its forward in a bare loop, which costs less than its generate."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(ids: list[int], tokens: int) -> list[float]:
        cache, chunk, moments = None, torch.tensor([ids]), []
        for _ in range(tokens):
            answer = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, chunk = answer.past_key_values, answer.logits[:, -1].argmax(-1, keepdim=True)
            chunk.tolist()
            moments.append(time.perf_counter())
        return [after - before for before, after in pairwise(moments)]

    return run


def memory_backend(megabytes: int, threads: int) -> Backend:
    """Read a block of memory in huge pages as often as there are tokens."""
    import mmap

    import torch

    torch.set_num_threads(threads)
    block = mmap.mmap(-1, megabytes * 10**6)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(block, dtype=torch.float32).fill_(1)

    def run(_: list[int], tokens: int) -> list[float]:
        moments = [time.perf_counter()]
        for _repetition in range(min(tokens, 32)):
            numbers.sum()
            moments.append(time.perf_counter())
        return [after - before for before, after in pairwise(moments)]

    return run


BACKENDS: dict[str, Callable[..., Backend]] = {
    "gemmule": gemmule_backend,
    "llama.cpp": llama_cpp_backend,
    "transformers": transformers_backend,
    "memory": memory_backend,
}


def serve(job: dict[str, Any]) -> None:
    """Be one backend: open the model, then run once for each line (a JSON list of ids, and a number) on stdin."""
    backend = BACKENDS[job["backend"]](*job["arguments"])
    print("ready", flush=True)
    for line in sys.stdin:
        ids, tokens = json.loads(line)
        print(json.dumps({"seconds": backend(ids, tokens), "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> int | None:
    """Return the largest resident size of this process so far (Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


class Runner:
    """A backend in its process."""

    def __init__(self, backend: str, *arguments: Any) -> None:
        job = json.dumps({"backend": backend, "arguments": arguments})
        # Threads that wait must not spin on the core of the backend under measurement.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.medians: list[float] = []
        self.best = float("inf")
        self.peak_mib: int | None = None
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args!r}: ended with status {self.process.wait()}")
        return line

    def run(self, ids: list[int], tokens: int, count: bool = True) -> None:
        """Run one trial."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([ids, tokens]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._answer())
        self.peak_mib = answer["peak_mib"]
        if count:
            self.medians.append(statistics.median(answer["seconds"]))
            self.best = min(self.best, *answer["seconds"])

    def end(self) -> None:
        """Let the process go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(backends: dict[str, tuple[Any, ...]], ids: list[int], tokens: int, trials: int) -> dict[str, Any]:
    """Interleave trials of the backends; return the figures of each."""
    runners = {name: Runner(*arguments) for name, arguments in backends.items()}
    for runner in runners.values():
        runner.run(ids, 8, count=False)
    for _ in range(trials):
        for runner in runners.values():
            runner.run(ids, tokens)
    for runner in runners.values():
        runner.end()
    return {
        name: {
            "ms": round(1000 * statistics.median(runner.medians), 3),
            "ms_per_trial": [round(1000 * median, 3) for median in runner.medians],
            "ms_best": round(1000 * runner.best, 3),
            "peak_mib": runner.peak_mib,
        }
        for name, runner in runners.items()
    }


def start_seconds(trials: int, model: Path) -> dict[str, Any]:
    """Time commands to the first byte of their output: help, and the first token of a continuation."""
    commands = {
        "help": ["--help"],
        "first_token": ["generate", str(model), "--max-new-tokens", "1"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for trial in range(trials + 1):  # the first reads the files from disk and compiles what has to be
        for name, words in commands.items():
            before = time.perf_counter()
            command = [sys.executable, "-m", "gemmule", *words]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                process.stdout.read(1)
                spent = time.perf_counter() - before
                process.stdout.read()
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
            if trial:
                seconds[name].append(spent)
    return {name: round(statistics.median(measured), 3) for name, measured in seconds.items()}


def against_others(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row, against the memory, llama.cpp and transformers."""
    import torch

    from gemmule.formats.folder import save_folder
    from gemmule.formats.gguf import save_gguf
    from gemmule.formats.opening import open_model

    model, tokenizer = open_model(options.model, dtype=torch.bfloat16)
    ids = tokenizer.encode(PROMPT)
    (folder / "hf").mkdir()
    save_folder(model, tokenizer, folder / "hf", torch.bfloat16)
    for dtype in ("bf16", "q8_0"):
        save_gguf(model, tokenizer, folder / f"{dtype}.gguf", dtype)
    numbers = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    # Bytes per token: of an embedding that is not tied to the output head, one row.
    numbers -= model.embedding.weight.numel() if model.head is not None else 0
    del model
    threads, hf = options.threads, str(folder / "hf")
    backends: dict[str, tuple[Any, ...]] = {
        "memory": ("memory", 512, threads),
        "gemmule bf16": ("gemmule", hf, "bf16", "native", 1, "cpu", threads),
        "llama.cpp bf16": ("llama.cpp", str(folder / "bf16.gguf"), threads),
        "gemmule int8": ("gemmule", hf, "int8", "native", 1, "cpu", threads),
        "llama.cpp q8_0": ("llama.cpp", str(folder / "q8_0.gguf"), threads),
        "gemmule bf16 plain": ("gemmule", hf, "bf16", "plain", 1, "cpu", threads),
        "transformers bf16": ("transformers", hf, threads),
    }
    if options.compiled:
        backends["gemmule bf16 compiled"] = ("gemmule", hf, "bf16", "compiled", 1, "cpu", threads)
    if options.backends:
        backends = {name: job for name, job in backends.items() if name in {"memory", *options.backends.split(",")}}
    found = compare(backends, ids, options.tokens, options.trials)
    bandwidth = 512e6 / found["memory"]["ms"] * 1e3
    bytes_each = {"q8_0": numbers * 34 / 32, "int8": numbers, "bf16": numbers * 2}
    for name, figures in found.items():
        size = next((size for word, size in bytes_each.items() if word in name), None)
        if size:
            figures["tokens_per_second"] = round(1000 / figures["ms"], 1)
            figures["share_of_read_bandwidth"] = round(size / figures["ms"] * 1e3 / bandwidth, 3)
    pairs = [
        ("gemmule bf16", "llama.cpp bf16"),
        ("gemmule int8", "llama.cpp q8_0"),
        ("gemmule bf16", "transformers bf16"),
        ("gemmule bf16", "gemmule bf16 plain"),
        ("gemmule bf16", "gemmule bf16 compiled"),
    ]
    ratios = {
        f"{ours} by {theirs}": round(found[theirs]["ms"] / found[ours]["ms"], 3)
        for ours, theirs in pairs
        if ours in found and theirs in found
    }
    loading = start_seconds(options.trials, folder / "hf") if options.loading else {}
    return {
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "backends": found,
        "speed_ratios": ratios,
        "start_seconds": loading,
    }


def main() -> None:
    """Measure, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder or .gguf file")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per trial")
    parser.add_argument("--trials", type=int, default=5, help="number of trials")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every backend")
    parser.add_argument("--backends", help="comma-separated names of the backends to run")
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile, too (minutes)")
    parser.add_argument("--loading", action="store_true", help="time the start of the commands, too")
    parser.add_argument("--out", type=Path, help="where to write the JSON, too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return
    from harness.trials import machine

    with tempfile.TemporaryDirectory() as name:
        result = against_others(options, Path(name))
    result |= {
        "model": options.model.name,
        "tokens": options.tokens,
        "trials": options.trials,
        "threads": options.threads,
        "machine": machine("transformers", "llama-cpp-python"),
        # Above the threads of one backend, other processes were running, and the times are not comparable.
        "load_averages": [round(load, 1) for load in os.getloadavg()],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
