import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gemmule.model.gemma3 import Gemma3
from gemmule.plan.cost_model import micro_batch_flops
from gemmule.plan.trace import Trace, TraceMode, TraceSettings, attention_flops, fuse, is_extern_kernel, peak, trace
from gemmule.train.loss import summed_loss
from gemmule.train.parallel import checkpoint_activations
from tiny import LENGTH, lively_model, some_tokens, tiny_config

ROWS = 2
How = Literal["none", "selective", "full"]
EVERY_WAY: tuple[How, ...] = ("none", "selective", "full")


def trace_settings(**changes: Any) -> TraceSettings:
    shape: dict[str, Any] = {
        "model": tiny_config(), "rows": ROWS, "context": LENGTH, "mask_documents": False, "precision": "fp32",
        "kernel": "sdpa", "activation_checkpointing": "none", "compiled": False, "sharded": False,
        "gradient_accumulation": False,
    }  # fmt: skip
    return TraceSettings(**shape | changes)


def forward(model: Gemma3) -> torch.Tensor:
    tokens = some_tokens(model.config, ROWS, LENGTH)
    return model(tokens, output_head=summed_loss(tokens))


def held_after_forward(traced: Trace) -> float:
    kinds = tiny_config().layer_kinds
    return sum(size for segment, changes in traced.step(kinds) if segment.forward for _, size in changes)


def test_flops_are_those_that_torch_counts_on_the_real_model() -> None:
    model = lively_model(tiny_config(), "reference").train()
    with FlopCounterMode(display=False) as counter:
        loss = forward(model)
    there = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    work = micro_batch_flops(trace(trace_settings(kernel="reference")), model.config.layer_kinds)
    assert (work.forward, work.backward) == (there, counter.get_total_flops())


def test_flops_of_fused_attention_are_those_of_torchs_other_kernels() -> None:
    query, key = torch.empty(2, 4, 13, 8), torch.empty(2, 2, 17, 8)
    count = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    assert attention_flops(query, key, matmuls=2) == count(query, key, key, out_val=None)


def test_matrix_products_of_all_parameters_cost_six_flops_a_parameter_and_token() -> None:
    config = tiny_config()
    matrices = sum(p.numel() for p in Gemma3(config).parameters() if p.ndim == 2)
    traced = trace(trace_settings(kernel="sdpa"))
    attention = [operation.flops for operation in traced.operations if operation.name.startswith("_scaled_dot")]
    blocks = config.num_hidden_layers / 2  # one of each kind was traced, and both cost the same
    products = micro_batch_flops(traced, config.layer_kinds).total - sum(attention) * blocks
    assert products == 6 * matrices * ROWS * LENGTH


def test_what_is_kept_is_what_autograd_saves_in_the_real_model() -> None:
    model = lively_model(tiny_config()).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model)
        assert loss.requires_grad
    made: Any = loss.grad_fn  # the gradients that the loss makes at once
    whole = sum(saved.values()) + sum(gradient.nbytes for gradient in made.gradients)
    assert held_after_forward(trace(trace_settings())) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("how", EVERY_WAY)
def test_peak_of_all_layers_is_that_of_the_real_model(how: How, mask_documents: bool) -> None:
    """Recorded once on real tensors, all seven layers, and once on fakes, one layer of each kind."""
    model = lively_model(tiny_config()).train()
    checkpoint_activations(model, how)
    tokens = some_tokens(model.config, ROWS, LENGTH)
    documents = torch.zeros(tokens.shape, dtype=torch.int32) if mask_documents else None
    recorder = TraceMode()
    recorder.mark("embedding", True)
    with recorder:
        for tensor in [*model.parameters(), tokens, *([] if documents is None else [documents])]:
            recorder.number(tensor, "given")
        model(tokens, documents=documents, output_head=summed_loss(tokens)).backward()
    changes = [(buffer.allocated, 0, buffer.size) for buffer in recorder.buffers if buffer.label != "given"]
    changes += [
        (buffer.freed, 1, -buffer.size)
        for buffer in recorder.buffers
        if buffer.label != "given" and buffer.freed is not None
    ]
    real = sum(peak(("all", size) for _, _, size in sorted(changes)).values())
    planned = sum(
        trace(trace_settings(activation_checkpointing=how, mask_documents=mask_documents))
        .peak(model.config.layer_kinds)
        .values()
    )
    assert planned == pytest.approx(real, rel=0.03)


def left_at_the_end(traced: Trace) -> dict[str, float]:
    left: dict[str, float] = {}
    for _, changes in traced.step(tiny_config().layer_kinds):
        for label, size in changes:
            left[label] = left.get(label, 0) + size
    return left


def test_memory_returns_to_nothing_but_gradients() -> None:
    left = left_at_the_end(trace(trace_settings()))
    assert left.pop("gradients", 0) + sum(left.values()) == pytest.approx(
        4 * sum(parameter.numel() for parameter in Gemma3(tiny_config()).parameters()), rel=0.01
    )


def test_computing_again_keeps_less_and_works_more() -> None:
    kinds = tiny_config().layer_kinds
    traces = [trace(trace_settings(activation_checkpointing=how)) for how in EVERY_WAY]
    kept = [held_after_forward(traced) for traced in traces]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    assert micro_batch_flops(traces[2], kinds).backward > micro_batch_flops(traces[0], kinds).backward
    assert micro_batch_flops(traces[1], kinds).backward == micro_batch_flops(traces[0], kinds).backward


def test_compiled_blocks_store_what_products_use_and_move_less() -> None:
    eager = trace(trace_settings())
    compiled = fuse(eager)
    kinds = tiny_config().layer_kinds
    assert held_after_forward(compiled) < held_after_forward(eager)
    assert micro_batch_flops(compiled, kinds) == micro_batch_flops(eager, kinds)
    for before, after in zip(eager.operations, compiled.operations, strict=True):
        assert after.bytes == before.bytes or not is_extern_kernel(before.name)
        if is_extern_kernel(before.name):
            assert all(compiled.buffers[number].size for number in (*before.reads, *before.writes))


def test_a_compiled_loss_holds_no_logits_in_fp32_and_keeps_what_it_hands_on() -> None:
    eager = trace(trace_settings(precision="bf16"))
    compiled = fuse(eager)
    logits = {
        (operation.name, operation.call[0].shape): operation.writes[0]
        for segment in eager.segments
        if segment.part == "loss" and segment.forward
        for operation in eager.operations[segment.start : segment.stop]
        if operation.writes and operation.call
    }
    shape = (ROWS * LENGTH, tiny_config().vocab_size)
    assert eager.buffers[logits["exp_", shape]].size == 4 * shape[0] * shape[1]
    assert compiled.buffers[logits["exp_", shape]].size == 0
    back = next(segment for segment in eager.segments if segment.part == "loss" and not segment.forward)
    for place in range(back.start, back.stop):  # is not compiled
        assert compiled.operations[place] == eager.operations[place]
        assert all(compiled.buffers[number].size for number in eager.operations[place].writes)


def test_how_operands_lie_in_memory_is_that_of_the_real_products() -> None:
    products = [operation for operation in trace(trace_settings()).operations if operation.name == "mm"]
    tokens = ROWS * LENGTH
    # There a weight (out, in) is used turned, back as it lies; its gradient turns the gradient of what it made.
    of_weights = [product.call for product in products if product.call[0].shape[1] == tokens]
    assert of_weights
    assert all(left.transposed and not right.transposed for left, right in of_weights)
    there = next(call for call in (product.call for product in products) if call[0].shape[0] == tokens)
    assert (there[0].transposed, there[1].transposed) == (False, True)


def test_rows_beside_gradients_of_an_earlier_micro_batch_make_none_anew() -> None:
    assert "gradients" in left_at_the_end(trace(trace_settings()))
    assert "gradients" not in left_at_the_end(trace(trace_settings(gradient_accumulation=True)))


@pytest.mark.parametrize("pattern", [1, 8], ids=["global layers alone", "local layers alone"])
def test_models_with_one_kind_of_layer_are_traced(pattern: int) -> None:
    config = tiny_config(sliding_window_pattern=pattern)
    parts = {segment.part for segment in trace(trace_settings(model=config)).segments}
    assert parts == {"embedding", config.layer_kinds[0], "loss"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_largest_model_is_traced_without_its_weights() -> None:
    """27 billion weights are 108 GB; the process that plans them stays below two."""
    program = (
        "from gemmule.model.config import Gemma3Config\nfrom gemmule.plan.trace import TraceSettings, trace\n"
        "from gemmule.processes import peak_memory\n"
        "shape = TraceSettings(model=Gemma3Config(size='27b'), rows=64, context=8192, mask_documents=True, "
        "precision='bf16', kernel='sdpa', activation_checkpointing='none', compiled=False, sharded=True, "
        "gradient_accumulation=False)\n"
        "assert trace(shape).peak(shape.model.layer_kinds)['activations'] > 1e13\n"
        "print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2e9
