"""Detection of hooks, adapters and replaced modules, which decoding without the modules' own forward cannot honor."""

import functools

from torch import nn
from torch.nn.modules import module as torch_modules

from gemmule.model.attention import KERNELS
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import MLP, Attention, Block, Gemma3, RMSNorm
from gemmule.model.init import meta_model

_MODULES: tuple[type[nn.Module], ...] = (Gemma3, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.Dropout)
_FORWARDS = {kind: kind.forward for kind in _MODULES}
_KERNELS = (*KERNELS, *KERNELS.values())


def find_modification(model: nn.Module) -> str | None:
    """Return how a model's forward pass differs from that of Gemma 3, or None.

    Detected are forward hooks (also those for all modules), replaced or added modules, replaced `forward` methods,
    parametrizations, biases, changed constants such as a norm's eps, weights of other shapes, and active dropout.
    """
    if type(model) is not Gemma3:
        return f"the model is a {type(model).__name__}, not a Gemma3"
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return "forward hooks are registered for all modules"
    originals = dict(_unmodified_model(model.config).named_modules(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, original in originals.items():
        if name not in modules:
            return f"{name} is missing"
        if difference := _difference(modules[name], original):
            return (name or "the model") + difference
    if added := next((name for name in modules if name not in originals), None):
        return f"{added} is not a module of Gemma 3"
    if (model.config.dropout or model.config.attention_dropout) and any(each.training for each in modules.values()):
        return "dropout is active, for the model is in training mode"
    return None


def _difference(module: nn.Module, original: nn.Module) -> str | None:
    """Return the modification of one module, worded to follow its name."""
    kind = type(original)
    if type(module) is not kind:
        return f" is a {type(module).__name__}, not a {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return " has forward hooks"
    if "forward" in vars(module) or kind.forward is not _FORWARDS.get(kind, kind.forward):
        return "'s forward is not Gemma 3's own"
    if getattr(module, "bias", None) is not None:
        return " has a bias"
    if getattr(module, "kernel", "sdpa") not in _KERNELS:
        return " has an attention kernel that is not Gemmule's"
    for name, value in vars(original).items():
        if name.startswith("_") or name in ("training", "kernel"):
            continue
        if getattr(module, name, None) != value:
            return f" has {name} = {getattr(module, name, None)}, not {value}"
    shapes = [getattr(getattr(each, "weight", None), "shape", None) for each in (module, original)]
    return None if shapes[0] == shapes[1] else f" has a weight of shape {shapes[0]}, not {shapes[1]}"


@functools.lru_cache(maxsize=4)
def _unmodified_model(config: Gemma3Config) -> Gemma3:
    """Return a model of this configuration on the meta device, to compare with."""
    return meta_model(config)
