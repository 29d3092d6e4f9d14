"""How a model is spread over processes and fitted into memory, from outside: the model never hears of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import unfilled
from gemmule.recipe import Settings
from gemmule.runtime import ALONE, World, whole
from gemmule.train.recorder import Recorder

# On a CPU gelu's tanh is made of exp, which takes half the time; near 0 it is off by 1e-7 and not by 1e-7 of itself.
COMPILER = {"cpp.use_decompose_tanh": True}


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


class Parallel(NamedTuple):
    """A model in place on every process of a world."""

    world: World
    # Each parameter is a tensor, or under fsdp and hsdp this process's rows of one.
    model: Gemma3
    # The model's own forward; its backward leaves the mean of all processes' gradients.
    forward: Callable[..., Tensor]
    # A block in which a micro-batch runs forward and backward: gradients travel only after the last one.
    micro_batch: Callable[[bool], AbstractContextManager[None]]
    # Where steps of one micro-batch can be recorded and replayed.
    recorder: Recorder | None = None


def parallelise(
    model: Gemma3,
    settings: ParallelSettings,
    compile_blocks: bool,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
    world: World,
    fill: Callable[[Gemma3, Callable[[Tensor, Tensor], None]], None],
) -> Parallel:
    """Put a model that has no weights yet (on the meta device) in its place; the one place that decides the order.

    `fill(model, put)` gives the weights by `put(parameter, all of its values)`. Recomputing comes first, so that it is
    compiled; compiled blocks are sharded, so that what is gathered and freed stays outside of their graphs; memory is
    taken when each process knows its share; ddp, which copies the first process's weights, comes last.
    """
    recompute(model, settings.activation_checkpointing)
    if compile_blocks:
        for block in model.blocks:
            block.compile(options=COMPILER)
    if settings.strategy != "ddp":
        shard(model, _mesh(settings.strategy, device, world), precision)
    model.to_empty(device=device)
    fill(model, _put)
    if isinstance(model, FSDPModule):
        return Parallel(world, model, model, partial(_fsdp_micro_batch, model))
    if world.size == 1:
        recorded = compile_blocks and device.type == "cuda"  # what is not compiled may wait for the device on its way
        return alone(model, world)._replace(recorder=Recorder(model) if recorded else None)
    copies = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Parallel(world, model, copies, lambda last: nullcontext() if last else copies.no_sync())


def alone(model: Gemma3, world: World = ALONE) -> Parallel:
    """Let one process have the whole model."""
    return Parallel(world, model, model, lambda _last: nullcontext())


def recompute(model: Gemma3, how: Literal["none", "selective", "full"]) -> None:
    """Let each block forget what it can compute again on the way back."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.blocks:
        block.forward = _again(block.forward, options)


def _again(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def recomputed(*arguments: object) -> Tensor:  # a function of ours, for the compiler looks into no other
        output: Tensor = checkpoint(forward, *arguments, **options)
        return output

    return recomputed


# The products, which are most of the work and little of the memory.
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _keep_products(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def shard(model: Gemma3, mesh: DeviceMesh, precision: Literal["bf16", "fp32"]) -> None:
    """Divide every parameter by rows; a block is gathered when its turn comes, the embedding stays gathered in a step.

    Under bf16 what is gathered is bf16, while each process's share of weights and gradients, and all sums, are fp32.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # angles need fp32
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _mesh(strategy: Literal["fsdp", "hsdp"], device: torch.device, world: World) -> DeviceMesh:
    if strategy == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    machines = world.size // world.local_size
    return init_device_mesh(device.type, (machines, world.local_size), mesh_dim_names=("copies", "shard"))


def _put(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter its values, of which this process keeps its share."""
    if isinstance(parameter, DTensor):
        values = values.to(parameter.device)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def _fsdp_micro_batch(model: FSDPModule, last: bool) -> AbstractContextManager[None]:
    model.set_requires_gradient_sync(last)
    return nullcontext()


def apart(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `make`, which needs whole matrices (number, rows, columns), for a stack of which each process has rows.

    Rows are exchanged for whole matrices, each process makes its share of them, and they are exchanged back.
    """

    def made(stack: Tensor) -> Tensor:
        if not isinstance(stack, DTensor):
            return make(stack)
        mesh, by_rows = stack.device_mesh, stack.placements
        by_matrix: list[Placement] = [Shard(0) if isinstance(place, Shard) else place for place in by_rows]
        mine = make(stack.redistribute(placements=by_matrix).to_local())
        all_made = DTensor.from_local(mine, mesh, by_matrix, shape=stack.shape, stride=stack.stride(), run_check=False)
        return all_made.redistribute(placements=by_rows)

    return made


def gather(parallel: Parallel, kernel: str) -> Gemma3 | None:
    """Return the whole model on the first process, for reading alone, and None on the others.

    Where weights are sharded it is a copy, in the main memory of the machine.
    """
    model = parallel.model
    if not isinstance(model, FSDPModule):
        return model if parallel.world.first else None
    copy = unfilled(model.config, kernel)
    for name, parameter in model.named_parameters():
        values = whole(parameter.detach())  # every process takes part
        if parallel.world.first:
            owner, _, last = name.rpartition(".")
            setattr(copy.get_submodule(owner), last, torch.nn.Parameter(values.cpu()))
    return copy if parallel.world.first else None
