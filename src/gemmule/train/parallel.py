"""Data parallelism (DDP, FSDP, HSDP) and activation checkpointing, applied to the model from outside."""

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

from gemmule.compiler import compile_block
from gemmule.distributed import World, full_tensor
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.model.lora import lora_of, merge, merged_weights
from gemmule.runtime import Runtime
from gemmule.settings import Settings
from gemmule.train.cuda_graph import CudaGraphStep


class ParallelSettings(Settings):
    """How the processes of a run share the work, and which activations are recomputed."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="data parallelism: ddp, each process has the whole model; fsdp, weights, gradients and optimizer "
        "state are sharded over all processes; hsdp, sharded within a machine and replicated between machines",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations that the backward pass recomputes instead of keeping them: none; selective, all but "
        "those of matmuls and attention; full, each block's",
    )


class Parallel(NamedTuple):
    """A model on this rank's device, wrapped for data parallelism."""

    runtime: Runtime
    # Each parameter is a tensor, or under fsdp and hsdp this rank's shard of one (a DTensor).
    model: Gemma3
    # The forward of the model or its wrapper; backward leaves the mean over ranks in the gradients.
    forward: Callable[..., Tensor]
    # The context of a micro-batch: gradients are all-reduced only after the last one of a step.
    micro_batch: Callable[[bool], AbstractContextManager[None]]
    # Captures and replays forward and backward, where steps of one micro-batch allow that.
    cuda_graph: CudaGraphStep | None = None

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.runtime.world


def parallelize(
    model: Gemma3,
    settings: ParallelSettings,
    compile_blocks: bool,
    runtime: Runtime,
    init: Callable[[Gemma3, Callable[[Tensor, Tensor], None]], None],
) -> Parallel:
    """Place a model that is on the meta device; this function alone decides the order of the wrappers.

    `init(model, copy)` writes the weights by `copy(parameter, full values)`. Activation checkpointing comes first, so
    that the compiler sees it; compiled blocks are sharded, so that all-gathers stay outside of their graphs; storage is
    allocated when each rank knows its shard; ddp, which broadcasts rank 0's weights, comes last.
    """
    checkpoint_activations(model, settings.activation_checkpointing)
    if compile_blocks:
        for block in model.blocks:
            compile_block(block)
    if settings.strategy != "ddp":
        shard(model, _mesh(settings.strategy, runtime), runtime.precision)
    model.to_empty(device=runtime.device)
    init(model, _copy_full)
    if isinstance(model, FSDPModule):
        return Parallel(runtime, model, model, partial(_fsdp_micro_batch, model))
    if runtime.world.size == 1:
        graphed = compile_blocks and runtime.device.type == "cuda"  # eager blocks may synchronize with the device
        return unwrapped(model, runtime)._replace(cuda_graph=CudaGraphStep(model) if graphed else None)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Parallel(runtime, model, ddp, lambda last: nullcontext() if last else ddp.no_sync())


def unwrapped(model: Gemma3, runtime: Runtime | None = None) -> Parallel:
    """Return a model that one process trains alone; by default in fp32 on the device of its weights."""
    runtime = runtime or Runtime(model.embedding.weight.device)
    return Parallel(runtime, model, model, lambda _last: nullcontext())


def checkpoint_activations(model: Gemma3, how: Literal["none", "selective", "full"]) -> None:
    """Recompute activations of each block in the backward pass instead of keeping them (activation checkpointing)."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _save_matmuls)
    for block in model.blocks:
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def recomputed(*arguments: object) -> Tensor:  # a function of this module, because the compiler skips torch's own
        output: Tensor = checkpoint(forward, *arguments, **options)
        return output

    return recomputed


# Matmuls and attention: most of the FLOPs and little of the memory.
_MATMULS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _save_matmuls(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def shard(model: Gemma3, mesh: DeviceMesh, precision: Literal["bf16", "fp32"]) -> None:
    """Shard every parameter by rows (FSDP2); blocks are gathered one after another, the embedding once per step.

    Under bf16, gathered parameters are bf16; the shards of weights and gradients, and all reductions, are fp32.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # rotary angles need fp32
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _mesh(strategy: Literal["fsdp", "hsdp"], runtime: Runtime) -> DeviceMesh:
    world, kind = runtime.world, runtime.device.type
    if strategy == "fsdp":
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    machines = world.size // world.local_size
    return init_device_mesh(kind, (machines, world.local_size), mesh_dim_names=("replicate", "shard"))


def _copy_full(parameter: Tensor, values: Tensor) -> None:
    """Write a parameter's full values, of which this rank keeps its shard."""
    if isinstance(parameter, DTensor):
        values = values.to(parameter.device)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def _fsdp_micro_batch(model: FSDPModule, last: bool) -> AbstractContextManager[None]:
    model.set_requires_gradient_sync(last)
    return nullcontext()


def on_whole_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let a function of whole matrices (number, rows, columns) take a stack that is sharded by rows.

    The stack is redistributed so that each rank has some whole matrices, and back (two all-to-alls).
    """

    def redistributed(stack: Tensor) -> Tensor:
        if not isinstance(stack, DTensor):
            return function(stack)
        mesh, by_rows = stack.device_mesh, stack.placements
        by_matrix: list[Placement] = [Shard(0) if isinstance(dim, Shard) else dim for dim in by_rows]
        local = function(stack.redistribute(placements=by_matrix).to_local())
        result = DTensor.from_local(local, mesh, by_matrix, shape=stack.shape, stride=stack.stride(), run_check=False)
        return result.redistribute(placements=by_rows)

    return redistributed


def gather_model(parallel: Parallel, kernel: str) -> Gemma3 | None:
    """Return the full model on rank 0, for reading only, and None on the others; every rank must call it.

    Where weights are sharded it is a copy in the machine's main memory; adapters are merged in fp32.
    """
    model, is_main = parallel.model, parallel.world.is_main
    if not isinstance(model, FSDPModule):
        if not is_main:
            return None
        return model if lora_of(model) is None else merge(model)
    copy = meta_model(model.config, kernel)
    for name, values in merged_weights(model, full_tensor):
        if is_main:
            owner, _, last = name.rpartition(".")
            setattr(copy.get_submodule(owner), last, torch.nn.Parameter(values.cpu()))
    return copy if is_main else None
