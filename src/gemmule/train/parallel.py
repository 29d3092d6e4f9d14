"""How a model is spread over processes and fitted into memory, from outside: the model never hears of it."""

from typing import Literal

from pydantic import Field

from gemmule.recipe import Settings


class ParallelSettings(Settings):
    """How the processes of a run share the work; a run of one process is a world of one."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="ddp: each process has the whole model; fsdp: each has a share of all weights, gradients, moments; "
        "hsdp: fsdp within a machine, copies between machines",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what is computed again on the way back instead of kept: nothing; all but the products of matrices "
        "and attention; each whole block",
    )
