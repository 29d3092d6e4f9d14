"""Optimizers: AdamW and Muon, and which parameters each of them updates."""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gemmule.distributed import full_tensor
from gemmule.fields import NotNegative, Positive, Text
from gemmule.settings import Problem, Settings
from gemmule.train.muon import Muon, orthogonal
from gemmule.train.parallel import on_whole_matrices

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """The optimizer and its constants; AdamW's defaults are the seed document's."""

    name: Text = Field("adamw", description="adamw, or muon: Muon for the blocks' matrices and AdamW for the rest")
    learning_rate: Positive = Field(2.5e-4, description="peak learning rate; under muon that of the blocks' matrices")
    adamw_learning_rate: Positive = Field(
        2.5e-4, description="under muon: peak learning rate of embedding, head and norms, which AdamW trains"
    )
    beta_1: Decay = Field(0.9, description="AdamW's decay of the mean of gradients")
    beta_2: Decay = Field(0.95, description="AdamW's decay of the mean of squared gradients")
    epsilon: Positive = Field(1e-8, description="added to AdamW's denominator")
    momentum: Decay = Field(0.95, description="Muon's momentum")
    # Decay would pull norms towards gain 1, and embeddings of rare tokens towards 0.
    weight_decay: NotNegative = Field(
        0.1, description="decoupled weight decay of the blocks' matrices; embedding, head and norms have none"
    )
    clip: Positive = Field(1.0, description="largest norm over all gradients; longer ones are scaled down to it")

    def problems(self) -> Iterator[Problem]:
        """Yield optimizers that do not exist."""
        if self.name not in OPTIMIZERS:
            yield Problem("name", self.name, f"no such optimizer; there are {', '.join(OPTIMIZERS)}")


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
    function = on_whole_matrices(orthogonal)
    for_matrices = Muon(
        matrices, settings.learning_rate, settings.weight_decay, settings.momentum, dtype, make=function
    )
    groups = [{"params": others, "weight_decay": 0.0}]
    return [for_matrices, _adamw(groups, settings.adamw_learning_rate, settings)]


def _adamw(groups: list[dict[str, object]], rate: float, settings: OptimizerSettings) -> AdamW:
    return AdamW(groups, lr=rate, betas=(settings.beta_1, settings.beta_2), eps=settings.epsilon, fused=True)


OPTIMIZERS: dict[str, Callable[[Named, OptimizerSettings, Arithmetic], list[Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


class Optimizers:
    """The optimizers of a run as one: each parameter that learns has one owner, learning rates scale together."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, precision: Arithmetic = "fp32") -> None:
        learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = {parameter: name for name, parameter in learning}
        self._max_norm = settings.clip
        self._optimizers = OPTIMIZERS[settings.name](learning, settings, precision)
        self._groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        self._peak_rates = [group["lr"] for group in self._groups]
        owned = [parameter for group in self._groups for parameter in group["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, self._names)), "each parameter needs exactly one owner"

    def grad_norm(self) -> Tensor:
        """Return the norm over all gradients of all ranks, on the device and without waiting for it."""
        return nn.utils.get_total_norm([parameter.grad for parameter in self._names if parameter.grad is not None])

    def clip_grad_norm(self, grad_norm: Tensor) -> None:
        """Scale the gradients down to `optimizer.clip` where their norm, as `grad_norm()` returned it, is larger."""
        if full_tensor(grad_norm).item() > self._max_norm:  # else a pass over all gradients would multiply them by 1
            nn.utils.clip_grads_with_norm_(list(self._names), self._max_norm, grad_norm)

    def set_learning_rate(self, scale: float) -> None:
        """Set each group's learning rate to a share of its peak."""
        for group, peak in zip(self._groups, self._peak_rates, strict=True):
            group["lr"] = peak * scale

    def step(self) -> None:
        """Update every parameter."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        """The first group's learning rate."""
        return float(self._groups[0]["lr"])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all optimizers as tensors named `parameter/quantity`."""
        state: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for parameter, quantities in optimizer.state.items():
                assert isinstance(parameter, nn.Parameter)
                for quantity, value in quantities.items():
                    state[f"{self._names[parameter]}/{quantity}"] = value
        return state

    def allocate_state(self, names: Iterable[str]) -> None:
        """Allocate the tensors that `state_dict` returned under these names, so that a checkpoint is read into them."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for key in names:
            name, _, quantity = key.rpartition("/")
            parameter = parameters[name]
            # Moments have the shape of their parameter; a step count is a scalar on its device.
            scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
            value = scalar if quantity == "step" else torch.zeros_like(parameter.detach())
            owners[parameter].state[parameter][quantity] = value
