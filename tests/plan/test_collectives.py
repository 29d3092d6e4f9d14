import pytest

from gemmule.plan.cost_model import (
    INTER_NODE_LATENCY,
    LINK_EFFICIENCY,
    collective_seconds,
    exposed_seconds,
    ring,
    step_collectives,
)
from gemmule.plan.devices import find_device
from gemmule.plan.memory import ParameterCount, Sharding

# A thousand parameters in the vocabulary and nine thousand in ten layers.
COUNT = ParameterCount(embedding=1_000, head=0, attention=4_000, mlp=5_000, norms=0)


def sent(sharing: Sharding, micro_batches: int = 1, matrices: int = 0) -> dict[str, float]:
    return {one.name: one.bytes for one in step_collectives(COUNT, 10, matrices, sharing, micro_batches, "bf16")}


def test_one_device_sends_nothing() -> None:
    for strategy in ("ddp", "fsdp", "hsdp"):
        assert step_collectives(COUNT, 10, 9_000, Sharding(strategy, 1, 8), 4, "bf16") == []


def test_ddp_sends_every_gradient_twice_whatever_the_micro_batches() -> None:
    assert sent(Sharding("ddp", 4, 8), 5) == {"all-reduce of gradients": pytest.approx(2 * 3 / 4 * 40_000)}


def test_fsdp_gathers_in_bf16_there_and_back_and_sums_in_fp32() -> None:
    assert sent(Sharding("fsdp", 4, 8)) == {
        "all-gather of weights": pytest.approx(3 / 4 * 2 * (9_000 + 9_000 + 1_000)),
        "reduce-scatter of gradients": pytest.approx(3 / 4 * 40_000),
    }


def test_fsdp_gathers_again_for_each_micro_batch_and_sums_once() -> None:
    once, thrice = sent(Sharding("fsdp", 4, 8)), sent(Sharding("fsdp", 4, 8), 3)
    assert thrice["all-gather of weights"] == 3 * once["all-gather of weights"]
    assert thrice["reduce-scatter of gradients"] == once["reduce-scatter of gradients"]


def test_hsdp_sums_shares_between_machines() -> None:
    found = sent(Sharding("hsdp", 32, 8))
    assert found["all-gather of weights"] == pytest.approx(7 / 8 * 2 * 19_000)
    assert found["all-reduce of gradient shards"] == pytest.approx(2 * 3 / 4 * 40_000 / 8)


def test_muon_exchanges_rows_for_matrices_and_back() -> None:
    assert sent(Sharding("fsdp", 4, 8), matrices=9_000)["all-to-all for Muon"] == pytest.approx(2 * 3 / 4 * 36_000 / 4)


def test_only_exchanges_among_more_than_a_machine_cross_between() -> None:
    def between(sharing: Sharding) -> dict[str, bool]:
        return {one.name: one.inter_node for one in step_collectives(COUNT, 10, 0, sharing, 1, "bf16")}

    assert between(Sharding("ddp", 8, 8)) == {"all-reduce of gradients": False}
    assert between(Sharding("fsdp", 16, 8))["all-gather of weights"]
    assert not between(Sharding("hsdp", 16, 8))["all-gather of weights"]
    assert between(Sharding("hsdp", 16, 8))["all-reduce of gradient shards"]


def test_time_is_bytes_over_the_link_and_a_hop_for_each_level() -> None:
    device = find_device("h100")
    one = ring("all-reduce", 1e9, 1024, 3, True)
    assert collective_seconds(one, device) == pytest.approx(
        2 * 1023 / 1024 * 1e9 / (LINK_EFFICIENCY * 50e9) + 3 * INTER_NODE_LATENCY * 10
    )


def test_what_computing_does_not_hide_is_waited_for() -> None:
    device = find_device("h100")
    found = step_collectives(COUNT, 10, 0, Sharding("ddp", 8, 8), 1, "bf16")
    whole = sum(collective_seconds(one, device) for one in found)
    assert exposed_seconds(found, device, 0.0, 10) == pytest.approx(whole)
    assert exposed_seconds(found, device, 0.4 * whole, 10) == pytest.approx(0.6 * whole)
    assert exposed_seconds(found, device, 100 * whole, 10) == pytest.approx(
        whole / 10
    )  # of the last block nothing is left to hide it
