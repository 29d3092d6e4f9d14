"""Optimizers: which rule moves which parameter."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gemmule.recipe import Settings
from gemmule.runtime import whole
from gemmule.train.muon import Muon, orthogonal
from gemmule.train.parallel import apart

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """The optimizer and its constants; AdamW's defaults are the seed document's."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Rate = 2.5e-4
    # Under muon: the rate of what AdamW trains beside it, the embedding and the norms.
    adamw_learning_rate: Rate = 2.5e-4
    beta_1: Decay = 0.9
    beta_2: Decay = 0.95
    epsilon: Rate = 1e-8
    momentum: Decay = 0.95  # muon's
    # Drawn from matrices only: decay would pull norms towards gain 1 and rare words towards silence.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    # The longest gradient, in the norm over all parameters, that is used as it is; longer ones are shortened to it.
    clip: Annotated[float, Field(gt=0)] = 1.0


Named = Iterable[tuple[str, nn.Parameter]]
Arithmetic = Literal["bf16", "fp32"]


def _split(parameters: Named) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Separate the matrices inside the blocks from embedding, head and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        inside = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return matrices, others


def adamw(parameters: Named, settings: OptimizerSettings, _precision: Arithmetic) -> list[Optimizer]:
    """AdamW for everything, without decay on embedding and norms (Loshchilov and Hutter, arXiv 1711.05101)."""
    matrices, others = _split(parameters)
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [_adamw(groups, settings.learning_rate, settings)]


def muon(parameters: Named, settings: OptimizerSettings, precision: Arithmetic) -> list[Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest (Jordan et al. 2024; update size as in arXiv 2502.16982)."""
    matrices, others = _split(parameters)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    mover = Muon(
        matrices, settings.learning_rate, settings.weight_decay, settings.momentum, dtype, make=apart(orthogonal)
    )
    groups = [{"params": others, "weight_decay": 0.0}]
    return [mover, _adamw(groups, settings.adamw_learning_rate, settings)]


def _adamw(groups: list[dict[str, object]], rate: float, settings: OptimizerSettings) -> AdamW:
    return AdamW(groups, lr=rate, betas=(settings.beta_1, settings.beta_2), eps=settings.epsilon, fused=True)


OPTIMIZERS: dict[str, Callable[[Named, OptimizerSettings, Arithmetic], list[Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


class Updater:
    """The optimizers of a run as one: each parameter has exactly one owner, rates follow a factor of their peak."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, precision: Arithmetic = "fp32") -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._clip = settings.clip
        self._optimizers = OPTIMIZERS[settings.name](list(model.named_parameters()), settings, precision)
        self._groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        owned = [parameter for group in self._groups for parameter in group["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, self._names)), "each parameter needs exactly one owner"

    def norm(self) -> Tensor:
        """Return the norm over all gradients, on the device, not waited for."""
        return nn.utils.get_total_norm([parameter.grad for parameter in self._names if parameter.grad is not None])

    def update(self, factor: float, measured: Tensor | None = None) -> float:
        """Clip the gradients, move every parameter at `factor` of its peak rate, clear the gradients.

        Returns the gradient's norm before clipping, `measured` where that was done; where that is not finite, nothing
        is moved.
        """
        measured = self.norm() if measured is None else measured
        norm = whole(measured).item()
        if math.isfinite(norm):
            if norm > self._clip:  # else a pass over all gradients would multiply them by 1
                nn.utils.clip_grads_with_norm_(list(self._names), self._clip, measured)
            for group, peak in zip(self._groups, self._peaks, strict=True):
                group["lr"] = peak * factor
            for optimizer in self._optimizers:
                optimizer.step()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        return norm

    @property
    def learning_rate(self) -> float:
        """The first group's rate of the last update."""
        return float(self._groups[0]["lr"])

    def state(self) -> dict[str, Tensor]:
        """Return everything the optimizers remember, as tensors named `parameter/quantity`."""
        remembered: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for parameter, quantities in optimizer.state.items():
                assert isinstance(parameter, nn.Parameter)
                for quantity, value in quantities.items():
                    remembered[f"{self._names[parameter]}/{quantity}"] = value
        return remembered

    def expect(self, names: Iterable[str]) -> None:
        """Make room for what `state` returned under these names, so that it can be read into place."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for key in names:
            name, _, quantity = key.rpartition("/")
            parameter = parameters[name]
            # Moments are like their parameter; steps are counted where the optimizer would count them.
            counter = quantity == "step"
            place = torch.zeros((), device=parameter.device) if counter else torch.zeros_like(parameter.detach())
            owners[parameter].state[parameter][quantity] = place
