"""K-quants, which llama.cpp makes out of a GGUF file, in a process of its own.

python -m gemmule.formats.k_quants SOURCE TARGET KIND
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gemmule.errors import MissingExtra, ModelError

# llama.cpp's numbers of file types.
KINDS = {"q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write `source` as one of KINDS; rows that are no multiple of 256 get another type of about the same size.

    Raises MissingExtra without llama.cpp, ModelError where it refuses.
    """
    if find_spec("llama_cpp") is None:
        raise MissingExtra("llama-cpp-python", "llama", f"writing {kind}")
    command = [sys.executable, "-m", "gemmule.formats.k_quants", str(source), str(target), kind]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"{target}: llama.cpp could not write it as {kind}: {last}")


def main() -> None:
    """Do what the arguments say."""
    import llama_cpp

    source, target, kind = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = KINDS[kind]
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    main()
