"""The model under test, and hooks that record what passes through it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gemmule.model.attention import AttentionMask
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

_LONGEST_WINDOW = 2048  # Google's are 512 and 1024

Verdict = Literal["passed", "failed", "skipped"]


# What a check returns.
Answer = tuple[Verdict, str]


class NotApplicable(Exception):  # noqa: N818 - not an error: the check is skipped
    """The model is not built in the way that a check looks into."""


@dataclass(frozen=True)
class ModelUnderTest:
    """A module with the interface of Gemma3, in fp32, and its tokenizer."""

    model: Gemma3
    tokenizer: Tokenizer

    @property
    def config(self) -> Gemma3Config:
        """The model's config."""
        return self.model.config

    @property
    def window(self) -> int:
        """The tokens that a local layer sees, as far as checks go: time and memory grow with its square."""
        return min(self.config.sliding_window, _LONGEST_WINDOW)

    def tokens(self, rows: int, length: int) -> Tensor:
        """Draw the same ids (rows, length) each time."""
        generator = torch.Generator().manual_seed(0)
        device = self.model.embedding.weight.device
        return torch.randint(self.config.vocab_size, (rows, length), generator=generator).to(device)

    def hidden(self, tokens: Tensor, **options: Any) -> Tensor:
        """Return what the model would read the logits from, (B,T,D), without gradients."""
        with torch.no_grad():
            return self.model(tokens, output_head=lambda hidden, _: hidden, **options)

    def blocks(self) -> list[nn.Module]:
        """Return the layers."""
        return list(part(self.model, "blocks").children())

    def attentions(self) -> list[nn.Module]:
        """Return the attention of each layer."""
        return [part(block, "attention") for block in self.blocks()]


def part(module: nn.Module, name: str) -> Any:
    """Return a part of a module by its dotted name; NotApplicable where there is none."""
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step, None)
        if found is None:
            raise NotApplicable(f"{type(module).__name__} has no part {name}")
    return found


class Call(NamedTuple):
    """What a module was given and what it made of it."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Tensor


@torch.no_grad()
def record(modules: Sequence[nn.Module], run: Callable[[], object]) -> dict[int, Call]:
    """Run something and return the last call of each module called, by its number; NotApplicable if none was."""
    calls: dict[int, Call] = {}
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def note(_: nn.Module, given: Any, options: Any, result: Any, number: int = number) -> None:
                calls[number] = Call(given, options, result)

            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run()
    if not calls:
        raise NotApplicable(f"the forward pass calls no {type(modules[0]).__name__}")
    return dict(sorted(calls.items()))


def record_each(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Call]:
    """Run something and return the last call of every module; NotApplicable where one was not called."""
    calls = record(modules, run)
    if missing := next((module for number, module in enumerate(modules) if number not in calls), None):
        raise NotApplicable(f"the forward pass does not call its {type(missing).__name__}")
    return list(calls.values())


class Mixing(NamedTuple):
    """What a layer's attention kernel was given, and what it returned."""

    query: Tensor  # (B,N,T,H), after norm and rotation
    key: Tensor  # (B,K,S,H)
    value: Tensor  # (B,K,S,H)
    mask: AttentionMask
    scale: float
    result: Tensor  # (B,N,T,H)


@contextmanager
def _kernel(attention: nn.Module, wrap: Callable[..., Tensor]) -> Iterator[None]:
    """Put `wrap(kernel, *arguments)` in the place of a layer's kernel."""
    kernel = part(attention, "kernel")
    setattr(attention, "kernel", partial(wrap, kernel))  # noqa: B010 - to mypy, modules have only tensors and modules
    try:
        yield
    finally:
        setattr(attention, "kernel", kernel)  # noqa: B010


@torch.no_grad()
def record_kernels(attentions: Sequence[nn.Module], run: Callable[[], object]) -> dict[int, Mixing]:
    """Run something and return what the kernel of each layer called did, by layer; NotApplicable if none was."""
    seen: dict[int, Mixing] = {}
    with ExitStack() as stack:
        for number, attention in enumerate(attentions):

            def note(kernel: Callable[..., Tensor], *given: Any, number: int = number) -> Tensor:
                result = kernel(*given)
                query, key, value, mask, scale, _ = given
                seen[number] = Mixing(query, key, value, mask, scale, result)
                return result

            stack.enter_context(_kernel(attention, note))
        run()
    if not seen:
        raise NotApplicable("the forward pass calls no attention kernel")
    return seen


@contextmanager
def evenly(attention: nn.Module) -> Iterator[None]:
    """Let a layer attend nearly evenly inside the block, so that nothing it may see gets weight zero by rounding."""

    def flatten(kernel: Callable[..., Tensor], *given: Any) -> Tensor:
        query, key, value, mask, scale, *rest = given
        return kernel(query, key, value, mask, scale * 1e-4, *rest)

    with _kernel(attention, flatten):
        yield


def differ(measured: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by more than a part of the greatest expected value; NaN differs from everything."""
    if measured.shape != expected.shape:
        return True
    if torch.equal(measured, expected):  # without a copy of a large vocabulary
        return False
    return not bool((measured - expected).abs().max() <= tolerance * expected.abs().max())
