import pytest
import torch

from gemmule.model.config import SIZES, Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.plan.memory import Sharding, count_parameters, peak_memory, trace_optimizer_step
from gemmule.plan.trace import TraceSettings, trace
from gemmule.train.loss import summed_loss
from gemmule.train.optim import OPTIMIZERS, Optimizers, OptimizerSettings
from tiny import lively_model, some_tokens, tiny_config

# Of the text models, as their files on the Hub have them.
PUBLISHED = {
    "270m": 268_098_176, "1b": 999_885_952, "4b": 3_880_263_168, "12b": 11_766_034_176, "27b": 27_009_346_304,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_as_many_as_published_and_as_the_model_has(size: str) -> None:
    config = Gemma3Config(size=size)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Gemma3(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters()) == PUBLISHED[size]


def test_parameters_are_significant() -> None:
    config = tiny_config(tie_word_embeddings=False)
    names = {name: parameter.numel() for name, parameter in Gemma3(config).named_parameters()}
    count = count_parameters(config)
    for field, words in {
        "embedding": ["embedding."], "head": ["head."], "mlp": ["mlp."], "norms": ["norm"],
        "attention": [f"attention.{part}." for part in ("query", "key", "value", "output")],
    }.items():  # fmt: skip
        found = sum(
            n
            for name, n in names.items()
            if any(word in name for word in words) and (field == "norms" or "norm" not in name)
        )
        assert getattr(count, field) == found, field
    assert count.body == count.total - count.embedding - count.head


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_remember_as_much_as_planned(name: str) -> None:
    config, settings = tiny_config(), OptimizerSettings(name=name)  # type: ignore[arg-type]
    model = lively_model(config)
    tokens = some_tokens(config)
    model(tokens, output_head=summed_loss(tokens)).backward()
    updater = Optimizers(model, settings)
    updater.step()
    kept = sum(value.nbytes for key, value in updater.state_dict().items() if not key.endswith("/step"))
    assert trace_optimizer_step(config, settings, "fp32").state == kept


def test_muon_works_with_stacks_of_all_matrices_of_a_shape() -> None:
    config = tiny_config()
    update = trace_optimizer_step(config, OptimizerSettings(name="muon"), "fp32")
    gate_and_up = 4 * 2 * config.num_hidden_layers * config.hidden_size * config.intermediate_size
    assert 3 * gate_and_up <= update.working <= 6 * gate_and_up
    assert trace_optimizer_step(config, OptimizerSettings(), "fp32").working == 0


def test_the_work_of_muon_is_its_five_iterations() -> None:
    config = tiny_config()
    update = trace_optimizer_step(config, OptimizerSettings(name="muon"), "fp32")
    by_hand = 0
    for name, matrix in Gemma3(config).named_parameters():
        if name.startswith("blocks.") and matrix.ndim == 2:
            short, long = sorted(matrix.shape)
            by_hand += 5 * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    assert sum(operation.flops * times for operation, times in update.operations) == by_hand


def moments(sharing: Sharding) -> dict[str, float]:
    config = tiny_config(hidden_size=96, intermediate_size=400)
    shape = TraceSettings(
        model=config, rows=1, context=16, mask_documents=False, precision="bf16", kernel="sdpa",
        activation_checkpointing="none",
        compiled=False, sharded=sharing.sharded, gradient_accumulation=False,
    )  # fmt: skip
    update = trace_optimizer_step(config, OptimizerSettings(), "bf16")
    return peak_memory(config, trace(shape), update, sharing, "bf16", "gpu", False, False, 0.0).classes


def test_shards_divide_weights_gradients_and_what_optimizers_remember() -> None:
    whole, shared, machines = (
        moments(Sharding("ddp", 1, 8)),
        moments(Sharding("fsdp", 16, 8)),
        moments(Sharding("hsdp", 16, 8)),
    )
    for label in ("weights", "optimizer"):
        assert shared[label] == whole[label] / 16
        assert machines[label] == whole[label] / 8
    assert "gathered weights" in shared
    assert "gathered weights" not in whole


def test_a_checkpoint_is_copied_in_the_memory_of_a_cpu() -> None:
    config = tiny_config(vocab_size=4800)
    shape = TraceSettings(
        model=config, rows=1, context=2, mask_documents=False, precision="fp32", kernel="sdpa",
        activation_checkpointing="none",
        compiled=False, sharded=False, gradient_accumulation=False,
    )  # fmt: skip
    update = trace_optimizer_step(config, OptimizerSettings(), "fp32")
    alone = Sharding("ddp", 1, 1)
    found = peak_memory(config, trace(shape), update, alone, "fp32", "cpu", False, False, 0.0)
    assert found.phase == "a checkpoint"
    weights = 4 * count_parameters(config).total
    assert found.classes["copies for the checkpoint"] == 2 * 3 * weights
