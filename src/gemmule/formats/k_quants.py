"""Quantize a GGUF file to K-quants with llama.cpp, in a subprocess.

python -m gemmule.formats.k_quants SOURCE TARGET KIND
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gemmule.errors import MissingExtra, ModelError
from gemmule.processes import python_module_command

# llama.cpp's file types (llama_ftype).
KINDS = {"q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


def check_quantizer(kind: str) -> None:
    """Raise MissingExtra where llama.cpp is not installed."""
    if find_spec("llama_cpp") is None:
        raise MissingExtra("llama-cpp-python", "llama", f"writing {kind}")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize `source` to one of KINDS; rows that are not a multiple of 256 get another type of similar size.

    Raises MissingExtra without llama.cpp, ModelError where it fails.
    """
    check_quantizer(kind)
    command = python_module_command("gemmule.formats.k_quants", str(source), str(target), kind)
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no error message"])[-1]
        raise ModelError(f"{target}: llama.cpp could not quantize it to {kind}: {last}")


def main() -> None:
    """Run the quantization in the subprocess."""
    import llama_cpp

    source, target, kind = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = KINDS[kind]
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    main()
