import pytest
import torch

from gemmule.plan.devices import MeasuredCostModel, _with_layout
from gemmule.plan.trace import Operand, Operation

LARGE = Operand((2**20,), torch.float32, False)


@pytest.fixture(scope="module")
def probe() -> MeasuredCostModel:
    return MeasuredCostModel(2**16)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_timed_with_operands_that_lie_as_its_own(transposed: bool) -> None:
    made = _with_layout(Operand((9, 8, 4), torch.bfloat16, transposed), [3, 2, 5])
    assert (made.shape, made.dtype) == ((3, 2, 5), torch.bfloat16)
    assert (made.stride(-2) < made.stride(-1)) is transposed


def test_what_is_fused_costs_its_exponentials_alone(probe: MeasuredCostModel) -> None:
    curve, line = (Operation(name, (LARGE,), 0, 0, (), ()) for name in ("gelu", "mul"))
    assert probe.seconds([line]) == 0.0
    assert probe.seconds([curve]) > 0.0
    assert probe.seconds([curve, curve]) == 2 * probe.seconds([curve])


def test_a_product_that_no_memory_holds_is_timed_in_part(probe: MeasuredCostModel) -> None:
    left, right = Operand((2**40, 512), torch.float32, False), Operand((512, 512), torch.float32, False)
    flops = 2 * 2**40 * 512 * 512
    seconds = probe.seconds([Operation("mm", (left, right), flops, 0, (), ())])
    assert 1e8 < flops / seconds < 1e15  # FLOP/s of anything that exists
