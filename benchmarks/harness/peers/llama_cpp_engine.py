"""Greedy decoding of many sequences with llama.cpp, all of them in each llama_decode, by its C functions alone."""

from itertools import product
from typing import Any, Callable  # noqa: UP035 - any Python that runs llama.cpp runs this


def setup(job: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Open the GGUF file; return the continuation of the prompts by each of the settings that may be the fastest."""
    import os
    from importlib.metadata import version

    import llama_cpp

    library = llama_cpp.llama_cpp
    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    # Weights of eight bits rearranged for AMX crash llama.cpp on some virtual machines.
    parameters.use_extra_bufts = job["precision"] != "int8"
    model = library.llama_model_load_from_file(job["gguf"].encode(), parameters)
    cores = len(os.sched_getaffinity(0))
    steps = {
        f"{threads} threads, flash attention {flash}, cache {cache}": _decoder(
            library, model, job, threads, flash, cache
        )
        for threads, flash, cache in product(sorted({1, cores}), (1, 0), ("f16", "f32"))
    }
    return steps, {"versions": {"llama_cpp_python": version("llama-cpp-python")}}


def _decoder(library: Any, model: Any, job: dict[str, Any], threads: int, flash: int, cache: str) -> Callable[[], Any]:
    """Return the continuation of all prompts in a context of its own."""
    import numpy as np

    prompts, tokens = job["prompts"], job["tokens"]
    rows, length = len(prompts), len(prompts[0])
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    options = library.llama_context_default_params()
    options.n_ctx = rows * 256 * -(-(length + tokens) // 256)  # llama.cpp rounds up to 256 for each sequence
    options.n_batch = options.n_ubatch = max(512, rows * length)
    options.n_seq_max, options.swa_full = rows, False
    options.n_threads = options.n_threads_batch = threads
    options.flash_attn_type = flash
    options.type_k = options.type_v = {"f32": library.GGML_TYPE_F32, "f16": library.GGML_TYPE_F16}[cache]
    context = library.llama_init_from_model(model, options)
    batch = library.llama_batch_init(rows * length, 0, 1)
    ids, positions, counts, wanted = (
        np.ctypeslib.as_array(getattr(batch, name), (rows * length,)) for name in ("token", "pos", "n_seq_id", "logits")
    )
    counts[:] = 1

    def decode() -> Any:
        if library.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(library.llama_get_logits(context), (rows, size)).argmax(1)

    def step() -> Any:
        library.llama_memory_clear(library.llama_get_memory(context), False)
        batch.n_tokens = rows * length
        ids[:], positions[:], wanted[:] = np.concatenate(prompts), np.tile(np.arange(length), rows), 0
        wanted[length - 1 :: length] = 1
        for index in range(rows * length):
            batch.seq_id[index][0] = index // length
        drawn = [decode()]
        batch.n_tokens, wanted[:rows] = rows, 1
        for index in range(rows):
            batch.seq_id[index][0] = index
        for position in range(length, length + tokens - 1):
            ids[:rows], positions[:rows] = drawn[-1], position
            drawn.append(decode())
        return np.stack(drawn, 1).tolist()

    return step
