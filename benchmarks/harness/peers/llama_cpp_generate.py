"""Decoding with llama.cpp."""

from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs llama.cpp runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Open the GGUF file and return one continuation of the prompt."""
    import os
    from importlib.metadata import version
    from itertools import islice
    from pathlib import Path

    import llama_cpp

    library = llama_cpp.llama_cpp
    usual = library.llama_model_default_params

    def plain_kernels() -> Any:
        # Weights rearranged for AMX crash llama.cpp on some virtual machines; the plain layout runs everywhere.
        parameters = usual()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_model_default_params = plain_kernels
    threads = len(os.sched_getaffinity(0))
    llama = llama_cpp.Llama(
        job["gguf"], n_ctx=len(job["ids"]) + job["tokens"] + 1, n_threads=threads, n_threads_batch=threads,
        n_gpu_layers=0, verbose=False,
    )  # fmt: skip

    def step() -> float:
        llama.reset()
        stream = llama.generate(job["ids"], temp=0.0)
        return float(sum(1 for _ in islice(stream, job["tokens"])))

    return step, {
        "weight_bytes": Path(job["gguf"]).stat().st_size,
        "threads": threads,
        "versions": {"llama_cpp_python": version("llama-cpp-python")},
    }
