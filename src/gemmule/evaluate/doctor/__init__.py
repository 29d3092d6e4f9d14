"""What is wrong with this model? Checks of a model's files and weights, and of how well they predict text.

The files: `tokenizer`. The weights alone: `weights`. How text is predicted, as configured and under plausible mistakes
of the config and the conversion: `search`, with `text` and `variants`.
"""

from collections.abc import Callable

import torch

from gemmule.evaluate.doctor.model import Answer, Finding, ModelUnderTest
from gemmule.evaluate.doctor.search import Progress, judge, loss_answer, variant_answer
from gemmule.evaluate.doctor.tokenizer import chat, read_declared, special_tokens, vocabulary
from gemmule.evaluate.doctor.weights import activations, weights

__all__ = ["CHECKS", "VARIANT_CHECKS", "Finding", "ModelUnderTest", "examine", "read_declared"]

_CHECKS: dict[str, Callable[[ModelUnderTest], Answer]] = {
    "weights": weights,
    "vocabulary": vocabulary,
    "special_tokens": special_tokens,
    "chat": chat,
    "activations": activations,
}
# Keys of config.json, and what conversions get wrong: each is tried otherwise on a text.
VARIANT_CHECKS = (
    "rope_theta",
    "rope_scaling_factor",
    "rope_local_base_freq",
    "sliding_window",
    "layer_types",
    "gate_up",
    "norms",
    "embedding_scale",
    "bos",
)
CHECKS = (*_CHECKS, "loss", *VARIANT_CHECKS)


def examine(test: ModelUnderTest, progress: Progress = lambda *_: None) -> list[Finding]:
    """Return the finding of each check: passed, failed, or skipped where it is not testable.

    The model must be in fp32, as bf16 rounds away the differences that are measured; it is left as it was.
    """
    if test.model.embedding.weight.dtype != torch.float32:
        raise ValueError("bf16 rounds away the differences that the doctor measures; give it model.float()")
    was_training = test.model.training
    test.model.eval()
    try:
        findings = []
        for number, (name, check) in enumerate(_CHECKS.items()):
            progress(f"checking {name}", number, len(_CHECKS))
            findings.append(Finding(name, *check(test)))
        if any(finding.verdict == "failed" for finding in findings if finding.name in ("weights", "vocabulary")):
            skipped = "not testable with such weights or vocabulary"
            return findings + [Finding(name, "skipped", skipped) for name in ("loss", *VARIANT_CHECKS)]
        judged = judge(test, progress)
    finally:
        test.model.train(was_training)
    findings.append(Finding("loss", *loss_answer(judged)))
    return findings + [Finding(name, *variant_answer(name, judged[0])) for name in VARIANT_CHECKS]
