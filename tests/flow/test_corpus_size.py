import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from the system's account of a process")
def test_memory_is_in_proportion_to_the_batch_not_to_the_corpus() -> None:
    command = [sys.executable, str(BENCHMARK), "--megabytes", "60", "--steps", "3"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    small, large = json.loads(ended.stdout)["runs"]
    assert (small["megabytes"], large["megabytes"]) == (1, 60)
    assert large["train"]["peak_mib"] < small["train"]["peak_mib"] + 48
    # The sample that the vocabulary is trained on, 128 MiB of text at most, is held in memory.
    assert large["prepare"]["peak_mib"] < small["prepare"]["peak_mib"] + 3 * 60
