"""Checks of the code: does a module with the interface of Gemma3 compute what Gemma 3 defines?

They need no other model to compare with. `parts` and `rotary` measure the parts, `behavior` the whole.
"""

from collections.abc import Callable

from structure_behavior import batch_independence, cache, causality, gradients, padding
from structure_instruments import Answer, ModelUnderTest, NotApplicable
from structure_parts import attention, embedding, head, mlp, norms, qk_norm, window, wiring
from structure_rotary import rotary

CHECKS: dict[str, Callable[[ModelUnderTest], Answer]] = {
    "causality": causality,
    "batch_independence": batch_independence,
    "cache": cache,
    "window": window,
    "rotary": rotary,
    "embedding": embedding,
    "norms": norms,
    "qk_norm": qk_norm,
    "attention": attention,
    "mlp": mlp,
    "wiring": wiring,
    "head": head,
    "gradients": gradients,
    "padding": padding,
}


def run_checks(test: ModelUnderTest) -> dict[str, Answer]:
    """Return the answer of each check; a model that raises fails it."""
    return {name: _run(check, test) for name, check in CHECKS.items()}


def _run(check: Callable[[ModelUnderTest], Answer], test: ModelUnderTest) -> Answer:
    try:
        return check(test)
    except NotApplicable as reason:
        return "skipped", str(reason)
    except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError) as error:
        first, *_ = str(error).splitlines() or [""]
        return "failed", f"{type(error).__name__}: {first}"
