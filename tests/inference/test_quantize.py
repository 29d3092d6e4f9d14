import copy
import mmap
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.quantize import Int8, quantize
from gemmule.model.gemma3 import Gemma3
from tiny import greatest_difference, lively_model, shallow_config, some_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_laid_out_are_the_same_and_lie_in_one_block(dtype: torch.dtype) -> None:
    model = lively_model(shallow_config()).to(dtype)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert move_to_huge_pages(model) is model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
        assert weight.dtype == dtype
    places = [weight.data_ptr() for weight in model.parameters()]
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert all(place % 64 == 0 for place in places)
        assert max(places) - min(places) < 2 * sum(weight.nbytes for weight in model.parameters())
        assert places == sorted(places)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
@pytest.mark.parametrize("eight", [False, True])
def test_weights_laid_out_lie_in_private_memory_that_asks_for_huge_pages(eight: bool) -> None:
    model = lively_model(shallow_config())
    model = move_to_huge_pages(quantize(model) if eight else model)
    held = model.embedding.weight.data
    header, *about = next(mapping for mapping in mappings() if covers(mapping[0], held.data_ptr()))
    assert header.split()[1] == "rw-p"  # what is shared gets huge pages only where the system was told so
    assert "hg" in next(line for line in about if line.startswith("VmFlags:")).split()


def mappings() -> list[list[str]]:
    """Return the lines of each piece of this process's memory, its addresses first."""
    found: list[list[str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            found[-1].append(line)
        else:
            found.append([line])
    return found


def covers(header: str, address: int) -> bool:
    first, last = (int(end, 16) for end in header.split()[0].split("-"))
    return first <= address < last


def test_a_kernel_without_huge_pages_gets_the_block_in_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10**6, raising=False)  # EINVAL, as there
    model = lively_model(shallow_config())
    before = model.embedding.weight.data_ptr()
    assert move_to_huge_pages(model).embedding.weight.data_ptr() != before


def test_eight_bits_laid_out_are_the_same() -> None:
    model = quantize(lively_model(shallow_config()))
    tokens = some_tokens(model.config)
    before, at = model(tokens), model.embedding.weight.data.data_ptr()
    assert torch.equal(move_to_huge_pages(model)(tokens), before)
    assert not hasattr(mmap, "MADV_HUGEPAGE") or model.embedding.weight.data.data_ptr() != at


def test_laid_out_weights_can_be_trained_and_moved() -> None:
    model = move_to_huge_pages(lively_model(shallow_config()))
    tokens = some_tokens(model.config)
    model(tokens).logsumexp(-1).mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.grad is not None
            weight -= weight.grad
    assert model(tokens).isfinite().all()
    assert model.bfloat16().embedding.weight.dtype == torch.bfloat16


def test_models_elsewhere_are_left_alone() -> None:
    with torch.device("meta"):
        model = Gemma3(shallow_config())
    assert move_to_huge_pages(model).embedding.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    matrix = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[7] = 0
    held = Int8(matrix)
    assert (held.data.dtype, held.dtype, held.shape) == (torch.int8, dtype, matrix.shape)
    rounding = torch.finfo(dtype).eps * matrix.float().abs()
    assert ((held.dequantize().float() - matrix.float()).abs() <= held.scales[:, None] * 0.5001 + rounding).all()
    assert held.data[7].eq(0).all()
    x, rows = torch.randn(3, 30).to(dtype), torch.tensor([[1, 4], [7, 49]])
    assert torch.equal(functional.linear(x, held), functional.linear(x, held.dequantize()))  # type: ignore[arg-type]
    assert torch.equal(functional.embedding(rows, held), held.dequantize()[rows])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        torch.relu(held)  # type: ignore[arg-type]


def test_a_model_in_eight_bits_says_nearly_the_same() -> None:
    model = lively_model(shallow_config(hidden_size=64, intermediate_size=96))
    tokens = some_tokens(model.config)
    with torch.inference_mode():
        exact = model(tokens)
        held = quantize(copy.deepcopy(model))
        assert {name.rpartition(".")[2] for name, _ in held.named_parameters()} == {"weight"}
        assert all(weight.ndim == 1 for weight in held.parameters()), "norms alone are left in full"
        error = (held(tokens) - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.05
    assert greatest_difference(held(tokens), exact) > 0
