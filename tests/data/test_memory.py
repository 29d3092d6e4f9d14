import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import sys
from pathlib import Path
from gemmule.data.settings import DataSettings
from gemmule.data.prepare import prepare_dataset
from gemmule.processes import peak_memory
from gemmule.tokenizer import TokenizerSettings
from gemmule.tokenizer.training import train_tokenizer
source, tokenizer, out = sys.argv[1:]
prepare_dataset(DataSettings(train=source), TokenizerSettings(path=tokenizer), Path(out))
print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_preparing_more_text_takes_no_more_memory(tmp_path: Path) -> None:
    from gemmule.tokenizer.training import train_tokenizer

    lines = [
        f"On day {number} the fox number {number * number} ran over hill {number % 97}.\n" for number in range(500)
    ]
    train_tokenizer(lines, 300).save(tmp_path / "tokenizer")
    peaks = [peak_mebibytes(tmp_path, size) for size in (8, 48)]
    assert peaks[1] < peaks[0] + 24


def peak_mebibytes(folder: Path, size: int) -> float:
    """Return the peak resident memory of a process that prepares so many MiB of text."""
    source = folder / f"{size}.txt"
    with source.open("w") as file:
        for number in range(size << 10):
            file.write(f"{number} is the number of this story, and {number * 7} of its friend. " * 14 + "<|endoftext|>")
    command = [sys.executable, "-c", PREPARE, str(source), str(folder / "tokenizer"), str(folder / str(size))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 2**20
