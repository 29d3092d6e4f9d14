"""Which weights of a model are not finite."""

import torch
from torch import Tensor, nn

from gemmule.errors import ModelError


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that hold NaN or infinity, in the model's order; reads each weight once."""
    return [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]


def refuse_nonfinite_weights(model: nn.Module, source: str = "MODEL") -> None:
    """Raise ModelError, which names the first one, where a weight of the model from `source` holds NaN or infinity."""
    if wrong := nonfinite_weights(model):
        others = f", and so do {len(wrong) - 1} others" if len(wrong) > 1 else ""
        damage = f"{wrong[0]} holds NaN or infinity{others}"
        raise ModelError(f"the model is damaged: {damage}; see `gemmule doctor {source}`")


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity; without a temporary copy, unlike Tensor.isfinite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    lowest, highest = torch.aminmax(tensor.detach())  # NaN if any element is
    return bool(lowest.isfinite() and highest.isfinite())
