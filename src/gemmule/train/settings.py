"""The settings of training that are neither of the optimizer nor of the schedule."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from gemmule.fields import Count, CountFrom0, Noun, Positive, Seed, Text
from gemmule.model.attention import KERNELS
from gemmule.runtime import NO_FP16, Precision
from gemmule.settings import Problem, Settings

AUTO = "auto"


class TrainSettings(Settings):
    """The length of training, its batches, its arithmetic, validation, samples and checkpoints."""

    steps: Count = Field(description="optimizer steps; where minutes is set, at most so many", examples=[1])
    start: Text | None = Field(
        None,
        description="model folder, run folder, .gguf file or owner/name whose weights, shape and tokenizer training "
        "continues from (continued pretraining); unset, first weights are drawn by seed",
    )
    minutes: Positive | None = Field(
        None, description="minutes of training: steps are timed before step 0, and as many taken as fit"
    )
    batch_size: Count = Field(64, description="sequences per optimizer step, of all processes together")
    micro_batch_size: Count | None = Field(
        None,
        description="sequences in one forward and backward pass of a process, whose gradients are accumulated; unset, "
        "all of a step",
    )
    context: Count = Field(256, description="tokens per sequence (sequence length, block size)")
    seed: Seed = Field(0, description="decides first weights, order of the data, dropout and samples")
    device: Text = Field(
        "auto", description="cpu, cuda, cuda:1, mps, or auto: the first of cuda, mps and cpu that is there"
    )
    precision: Annotated[Precision, Noun('"auto", "bf16" or "fp32"')] = Field(
        "auto",
        description="arithmetic of the forward and backward pass (weights are fp32); auto: bf16 on GPUs that have it, "
        "on a CPU the one that is faster in a trial before the run",
    )
    attention: Text = Field(
        "sdpa",
        description="attention kernel: sdpa, block-local, flex, reference, or auto: the fastest "
        "in a short trial before the run; what differs from the reference there is not used",
    )
    compile: bool = Field(
        False, description="compile each block; where the machine cannot, the run says so and does not"
    )
    damp_branches: bool = Field(
        False, description="start the norms after attention and MLP at gain 1/sqrt(2 x layers) instead of 1"
    )
    log_every: Count = Field(10, description="steps between lines of metrics.jsonl")
    validate_every: Count = Field(500, description="steps between validations")
    validation_tokens: Count | None = Field(
        None, description="validation tokens to measure, the first so many; unset, all"
    )
    sample_prompts: tuple[str, ...] = Field(
        ("Once upon a time",), strict=False, description="prompts that are continued at each validation"
    )
    sample_tokens: Count = Field(200, description="longest continuation of a sample prompt")
    checkpoint_every: Count = Field(500, description="steps between checkpoints")
    keep_checkpoints: Count = Field(
        2,
        description="newest checkpoints to keep, beside the best of those whose step was validated and the newest "
        "whose weights gave a finite gradient",
    )
    final_model: Literal["last", "best"] = Field(
        "last", description="weights of the model folder: the last ones, or those of the best validated checkpoint"
    )
    early_stopping: Count | None = Field(
        None,
        description="validations in a row without a lower loss at which the run ends (early stopping, patience); "
        "unset, it takes all steps",
    )
    max_skipped_steps: CountFrom0 = Field(
        0,
        description="steps with a loss or gradient that is not finite which are skipped; at the next one the run stops",
    )

    @classmethod
    def adapt(cls, table: dict[str, Any], changes: dict[str, Any]) -> Iterator[str]:
        """Rename the attention kernel of older recipes."""
        for settings in (table, changes):
            if settings.get("attention") == "folded":
                settings["attention"] = "block-local"
                yield 'train.attention = "folded" is now called "block-local", which is used'

    def problems(self) -> Iterator[Problem]:
        """Yield micro-batches that do not divide the batch, kernels and devices that do not exist, and fp16."""
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            advice = f"must divide train.batch_size ({self.batch_size})"
            yield Problem("micro_batch_size", self.micro_batch_size, advice)
        if self.attention not in (AUTO, *KERNELS):
            yield Problem("attention", self.attention, f"no such kernel; there are {', '.join((AUTO, *KERNELS))}")
        if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d{1,4})?", self.device):
            yield Problem("device", self.device, "no such device; write auto, cpu, cuda, cuda:1 or mps")
        if self.start is not None and self.damp_branches:
            yield Problem("damp_branches", True, "is for first weights that are drawn; train.start brings its own")
        if self.precision == "fp16":
            yield Problem("precision", self.precision, NO_FP16)
        if self.early_stopping is not None and self.validate_every % self.checkpoint_every:
            advice = (
                f"keeps the best weights, so train.checkpoint_every ({self.checkpoint_every}) must divide "
                f"train.validate_every ({self.validate_every})"
            )
            yield Problem("early_stopping", self.early_stopping, advice)
