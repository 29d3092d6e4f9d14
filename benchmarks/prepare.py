"""Does `gemmule prepare` survive `kill -9` on a large corpus, and how fast does it go beside `datasets.map`?

    python benchmarks/prepare.py --text train.txt --megabytes 1000 --out prepare.json

Does what `gemmule bench prepare` does, one round of it; then prepares the same corpus again, killing the whole process
group at random moments and going on, and compares the bytes. Prints, and writes to --out, one JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gemmule.bench.prepare import compare_preparing
from gemmule.bench.rounds import Effort


def digest(folder: Path) -> str:
    """Return one hash of all files of a folder."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def killed_and_resumed(command: list[str], out: Path, seconds: float, kills: int, draw: random.Random) -> list[float]:
    """Run a command, killing its whole process group at random moments; return them; then let it finish."""
    moments: list[float] = []
    for _ in range(kills):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        moments.append(round(draw.uniform(0.1, 0.8) * seconds / kills, 1))
        try:
            process.wait(moments[-1])
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return moments


def main() -> None:
    """Measure, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="the text file to repeat and perturb; stories, where none is named")
    parser.add_argument("--megabytes", type=float, default=1000, help="size of the corpus")
    parser.add_argument("--kills", type=int, default=1, help="how often the second preparation is killed")
    parser.add_argument("--out", type=Path, help="where to write the JSON, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, killed = Path(name), Path(name) / "killed"
        effort = Effort(1, 0.0, None, 1)
        say = lambda label, *_: print(label, file=sys.stderr)  # noqa: E731
        result = compare_preparing(options.text, options.megabytes, ["transformers"], effort, folder, say)
        command = [sys.executable, "-m", "gemmule", "prepare", str(folder / "corpus.txt"), "--out", str(killed)]
        command += ["--tokenizer", str(folder / "tokenizer")]
        seconds = result["sides"]["gemmule"]["seconds"]["median"]
        draw = random.Random(int(options.megabytes))
        result["killed_after_seconds"] = killed_and_resumed(command, killed, seconds, options.kills, draw)
        first = next(folder.glob("prepared-*"))
        result["killed_and_resumed_is_byte_identical"] = digest(killed) == digest(first)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
