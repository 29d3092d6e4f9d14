"""Devices by name: what their makers publish, and what an hour costs by assumption.

Arithmetic is the dense peak (no sparsity) with sums in fp32, as the data sheets have it; docs/plan.md names them. `cpu`
stands for the machine at hand and is measured (`probe.py`).
"""

import difflib
from typing import NamedTuple

from gemmule.errors import DeviceError

_TERA, _GIGA = 1e12, 1e9


class Device(NamedTuple):
    """One kind of device, and how it reaches others of its kind."""

    name: str
    title: str
    bf16: float | None  # FLOP/s; None where it computes no bf16
    fp32: float  # FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s to its memory
    # Bytes/s in one direction to another in the same machine, and to another machine.
    inside: float
    between: float
    per_machine: int  # how many a machine has, usually
    watts: float
    price: float  # US dollars an hour, assumed
    fused_attention: bool = True


def _gpu(
    title: str,
    bf16: float | None,
    fp32: float,
    gigabytes: float,
    bandwidth: float,
    inside: float,
    between: float,
    watts: float,
    price: float,
    per_machine: int = 8,
) -> tuple[str, Device]:
    name = title.split()[-1].lower()
    peak = None if bf16 is None else bf16 * _TERA
    numbers = (fp32 * _TERA, gigabytes * _GIGA, bandwidth * _GIGA, inside * _GIGA, between * _GIGA)
    return name, Device(name, title, peak, *numbers, per_machine, watts, price)


def _apple(title: str, fp32: float, gigabytes: float, bandwidth: float, watts: float) -> tuple[str, Device]:
    """Apple publishes no rates but the M1's 2.6 TFLOP/s: the others are cores x clock; torch trains there in fp32."""
    name = title.split()[-1].lower()
    numbers = (fp32 * _TERA, gigabytes * _GIGA, bandwidth * _GIGA, 1 * _GIGA, 1 * _GIGA)
    return name, Device(name, title, None, *numbers, 1, watts, 0.0, fused_attention=False)


# TFLOP/s in bf16 and fp32, GB, GB/s of memory, inside and between machines, watts, dollars an hour.
DEVICES: dict[str, Device] = dict(
    [
        _gpu("NVIDIA B200", 2250, 75, 180, 7700, 900, 50, 1000, 6.00),
        _gpu("NVIDIA H200", 989, 67, 141, 4800, 450, 50, 700, 3.80),
        _gpu("NVIDIA H100", 989, 67, 80, 3350, 450, 50, 700, 3.00),
        _gpu("NVIDIA A100-80", 312, 19.5, 80, 2039, 300, 25, 400, 1.80),
        _gpu("NVIDIA A100-40", 312, 19.5, 40, 1555, 300, 25, 400, 1.30),
        _gpu("NVIDIA L40S", 362, 91.6, 48, 864, 32, 25, 350, 1.00),
        _gpu("NVIDIA RTX6000ADA", 364, 91.1, 48, 960, 32, 12.5, 300, 0.90, 4),
        _gpu("NVIDIA L4", 121, 30.3, 24, 300, 32, 12.5, 72, 0.70),
        _gpu("NVIDIA A10", 125, 31.2, 24, 600, 32, 12.5, 150, 0.75, 4),
        _gpu("NVIDIA T4", None, 8.1, 16, 320, 16, 6.25, 70, 0.35, 4),
        _gpu("NVIDIA V100", None, 15.7, 32, 900, 150, 12.5, 300, 0.80),
        _gpu("NVIDIA RTX 5090", 209.5, 104.8, 32, 1792, 64, 3, 575, 0.80, 4),
        _gpu("NVIDIA RTX 4090", 165.2, 82.6, 24, 1008, 32, 3, 450, 0.50, 4),
        _gpu("NVIDIA RTX 3090", 71, 35.6, 24, 936, 32, 3, 350, 0.25, 4),
        _gpu("NVIDIA RTX 3060", 25.5, 12.7, 12, 360, 16, 3, 170, 0.10, 2),
        _gpu("AMD MI300X", 1307, 163.4, 192, 5300, 448, 50, 750, 2.50),
        _apple("Apple M1", 2.6, 16, 68, 20),
        _apple("Apple M2", 3.6, 24, 100, 20),
        _apple("Apple M3", 3.5, 24, 100, 20),
        _apple("Apple M3-MAX", 14.2, 128, 400, 60),
        _apple("Apple M4", 4.3, 32, 120, 22),
        _apple("Apple M4-MAX", 17.0, 128, 546, 65),
    ]
)
# Short names for what is usually meant.
_ALIASES = {"a100": "a100-80", "rtx4090": "4090", "rtx3090": "3090", "rtx5090": "5090", "rtx3060": "3060"}


def find_device(name: str) -> Device:
    """Return a device by its name; DeviceError that names the nearest where there is none."""
    wanted = name.lower().replace(" ", "").replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in DEVICES:
        return DEVICES[wanted]
    known = ["cpu", *DEVICES, *_ALIASES]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DeviceError(f"--device {name}: no such device is known; {hint}there are cpu, {', '.join(DEVICES)}")
