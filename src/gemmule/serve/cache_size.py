"""The bound of the KV cache: bytes to pages, and what they are worth in tokens."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from gemmule.errors import DeviceError
from gemmule.inference.kv_cache import CacheSize, pages_of, window_pages
from gemmule.inference.pages import KINDS, PAGE, numbers_per_layer
from gemmule.model.config import Gemma3Config, Kind

# The share of the available memory that the caches of all models get together by default.
SHARE = 0.25
# Pages of local layers that are kept for later requests, per page of global layers: a window at every fourth, and as
# many again where turns end.
_KEPT = 0.5


class CacheBound(NamedTuple):
    """The size of a cache, in pages, bytes, and tokens that it keeps at most."""

    size: CacheSize
    bytes: int
    tokens: int


def page_bytes(config: Gemma3Config, kind: Kind, dtype: torch.dtype) -> int:
    """Return the bytes of a page of all layers of a kind."""
    return numbers_per_layer(config) * config.layer_kinds.count(kind) * dtype.itemsize


def cache_bound(
    config: Gemma3Config, available: int, rows: int, longest: int, chunk: int, dtype: torch.dtype
) -> CacheBound:
    """Return the size of a cache of at most `available` bytes for `rows` sequences of up to `longest` positions.

    DeviceError where not even one of them fits.
    """
    local, global_ = (page_bytes(config, kind, dtype) for kind in KINDS)
    one = {kind: pages_of(config, kind, longest, chunk) for kind in KINDS}
    least = one["local"] * local + one["global"] * global_
    if available < least:
        raise DeviceError(
            f"a KV cache of {available:,} bytes: a sequence of {longest:,} positions needs {least:,}; "
            "give more with --cache, or a shorter --context"
        )
    # Beside the sequences that run, local layers keep less than global ones.
    own = one["local"] if not global_ else max(1, min(rows, available // (2 * least))) * one["local"]
    kept = _KEPT if window_pages(config) else 1.0
    left = available - own * local
    pages = max(one["global"], math.floor(left / (global_ + kept * local)))
    size = CacheSize((available - pages * global_) // local if local else 0, pages if global_ else 0)
    tokens = PAGE * (size.global_ if global_ else size.local)
    return CacheBound(size, size.local * local + size.global_ * global_, tokens)


def available_memory(device: torch.device) -> int:
    """Return the bytes that a device could give now, within the limit of the container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limits = [_meminfo(), _container()]
    known = [each for each in limits if each is not None]
    return min(known) if known else 4 << 30


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    """Return what is left of the limit of the control group."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
    except (OSError, ValueError):  # none, or "max"
        return None
    return max(0, limit - used)
