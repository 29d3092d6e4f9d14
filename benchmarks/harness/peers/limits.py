"""Limits of the machine: throughput of large matmuls, and memory bandwidth."""

import time
from typing import Any, Callable, Optional  # noqa: UP035


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Return the maximum over several sizes."""
    import torch

    device = torch.device(job["device"])
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32

    def best(work: Callable[[], Any]) -> float:
        work()
        times: list[float] = []
        while sum(times) < 0.3 or (len(times) < 5 and sum(times) < 2):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 4]

    matmuls: list[float] = []
    for size in (4096, 8192, 12288) if device.type == "cuda" else (1024, 2048, 3072):
        if matmuls and 2 * size**3 / matmuls[-1] > 2:  # a number format without instructions; smaller ones will do
            break
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(one)
        matmuls.append(2 * size**3 / best(lambda: torch.mm(one, other, out=out)))  # noqa: B023 - called at once
    # A matrix larger than any cache, read once by a matrix-vector product, as in decoding.
    more = 8 if device.type == "cuda" else 1
    matrix = torch.ones(more * 2**14, 2**13, device=device, dtype=dtype)
    vector = torch.ones(2**13, device=device, dtype=dtype)
    numbers = torch.ones(more * 2**26, dtype=torch.float32, device=device)
    reading = [
        matrix.numel() * matrix.element_size() / best(lambda: matrix @ vector),
        numbers.numel() * 4 / best(lambda: numbers.sum()),
    ]
    return None, {"flops": max(matmuls), "bytes": max(reading), "threads": torch.get_num_threads()}
