import pytest

from gemmule.errors import DeviceError
from gemmule.plan.devices import DEVICES, find_device


def test_devices_are_found_however_they_are_written() -> None:
    assert find_device("H200").title == "NVIDIA H200"
    assert find_device("RTX 4090") == find_device("4090")
    assert find_device("a100") == find_device("A100_80")


def test_an_unknown_device_is_told_with_the_nearest() -> None:
    with pytest.raises(DeviceError, match="--device h10: unknown device; did you mean h100"):
        find_device("h10")


@pytest.mark.parametrize("name", DEVICES)
def test_figures_are_in_the_units_of_data_sheets(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert 1e12 < device.fp32 <= (device.bf16 or device.fp32) < 1e16
    assert 8e9 < device.memory < 1e12
    assert 50e9 < device.bandwidth < 2e13
    assert device.intra_node >= device.inter_node
    assert 10 < device.watts < 1500
