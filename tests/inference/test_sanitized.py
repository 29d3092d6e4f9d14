"""The C files under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds, nothing undefined."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What each script must have done at least.
ENOUGH = {
    "sanitized_steps.py": {
        "all_shapes": 1000,
        "all_numbers_of_rows": 70,
        "hostile_batches": 580,
        "hostile_weights": 800,
        "hostile_constants": 150,
        "misaligned_weights": 15,
    },
    "sanitized_draws.py": {
        "all_sizes": 5000,
        "hostile_settings": 6000,
        "hostile_logits": 1000,
        "hostile_tokens": 40,
    },
}


def runtime(name: str) -> str | None:
    """Return where the compiler keeps one of its own libraries."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    told = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    place = told.stdout.strip()
    return place if Path(place).is_absolute() and Path(place).exists() else None


@pytest.mark.slow
@pytest.mark.skipif(runtime("libasan.so") is None, reason="the C compiler here has no AddressSanitizer")
@pytest.mark.parametrize("script", ENOUGH)
def test_no_input_leads_c_astray(script: str, tmp_path: Path) -> None:
    # The second, so that exceptions of torch find their way.
    preloaded = ":".join(filter(None, (runtime("libasan.so"), runtime("libstdc++.so.6") or runtime("libstdc++.so"))))
    environment = os.environ | {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "XDG_CACHE_HOME": str(tmp_path),
        "CC": "cc",
    }
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(Path(__file__).with_name(script))]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-6000:]
    counts = {name: int(count) for name, count in (line.split() for line in told.stdout.splitlines())}
    assert counts.keys() == ENOUGH[script].keys()
    for name, least in ENOUGH[script].items():
        assert counts[name] >= least, counts
