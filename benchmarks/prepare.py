"""How fast does `gemmule prepare` go, in how much memory, on how many cores, and does it survive `kill -9`?

    python benchmarks/prepare.py --text train.txt --megabytes 1000 --out benchmarks/results/prepare.json

Repeats and perturbs a text file to a corpus of the size asked for; prepares it; prepares it again, killing the whole
process group at random moments and going on; compares the bytes; and tokenizes the same corpus by `datasets.map` with
transformers' fast tokenizer on the same tokenizer.json. Prints, and writes to --out, one JSON object.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEPARATOR = "\n<|endoftext|>\n"

PEER = """
import json, sys, time
import datasets, transformers
source, tokenizer, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer)
began = time.perf_counter()
rows = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=sys.argv[4])
loaded = time.perf_counter()
done = rows.map(lambda batch: tokenizer(batch["text"]), batched=True, num_proc=workers, remove_columns=["text"])
ended = time.perf_counter()
tokens = sum(len(ids) for ids in done[:1000]["input_ids"])
print(json.dumps({"load_seconds": loaded - began, "map_seconds": ended - loaded, "documents": len(done)}))
"""


def write_corpus(text: Path, out: Path, megabytes: int) -> None:
    """Repeat the documents of a text file, each time with a tenth of the words drawn anew from the same document."""
    documents = [part.strip() for part in text.read_text(encoding="utf-8").split("<|endoftext|>") if part.strip()]
    draw, left = random.Random(0), megabytes * 10**6
    with out.open("w", encoding="utf-8") as file:
        while left > 0:
            words = draw.choice(documents).split(" ")
            for _ in range(max(1, len(words) // 10)):
                words[draw.randrange(len(words))] = draw.choice(words)
            left -= len((" ".join(words) + SEPARATOR).encode())
            file.write(" ".join(words) + SEPARATOR)


def write_parquet(text: Path, out: Path) -> None:
    """Put the documents of a text file into the rows of a Parquet file, which is what `datasets` reads best."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.schema([("text", arrow.string())])
    with parquet.ParquetWriter(out, schema) as table, text.open(encoding="utf-8") as file:
        rows, document = [], []
        for line in file:
            if line == "<|endoftext|>\n":
                rows.append("".join(document).strip())
                document = []
                if len(rows) == 50_000:
                    table.write_table(arrow.table({"text": rows}, schema))
                    rows = []
            else:
                document.append(line)
        if rows:
            table.write_table(arrow.table({"text": rows}, schema))


def tree_memory(process: int) -> int:
    """Return the resident bytes of a process and of all below it, shared pages counted once for each (Linux)."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
    return total


class Run:
    """A command in a process group of its own, watched."""

    def __init__(self, command: list[str]) -> None:
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, tree_memory(self.process.pid))
            time.sleep(0.1)

    def finish(self) -> dict[str, Any]:
        """Wait for the end; return seconds, processor seconds and the peak memory of all its processes together."""
        before = os.times()
        out, _ = self.process.communicate()
        if self.process.returncode:
            sys.exit(f"{self.process.args} ended with status {self.process.returncode}")
        after = os.times()
        seconds = time.perf_counter() - self.began
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "cores_used": round(cpu / seconds, 2),
            "peak_mib": round(self.peak / 2**20),
            "printed": out,
        }


def digest(folder: Path) -> str:
    """Return one hash of all files of a folder."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def prepare_command(source: Path, out: Path, workers: int, options: list[str]) -> list[str]:
    """Return the command that prepares the corpus."""
    command = [sys.executable, "-m", "gemmule", "prepare", str(source), "--out", str(out), "--workers", str(workers)]
    return [*command, *options, "--json"]


def killed_and_resumed(command: list[str], seconds: float, kills: int, draw: random.Random) -> list[float]:
    """Run a command, killing its whole process group at random moments; return them; then let it finish."""
    moments = []
    for _ in range(kills):
        run = Run(command)
        moments.append(round(draw.uniform(0.1, 0.8) * seconds / kills, 1))
        try:
            run.process.wait(moments[-1])
            break
        except subprocess.TimeoutExpired:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
    if Path(command[command.index("--out") + 1]).exists():
        return moments
    Run(command).finish()
    return moments


def main() -> None:
    """Measure, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the text file to repeat and perturb")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of both sides")
    parser.add_argument("--kills", type=int, default=1, help="how often the second preparation is killed")
    parser.add_argument("--set", action="append", default=[], help="settings for gemmule prepare")
    parser.add_argument("--out", type=Path, help="where to write the JSON, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, rows = folder / "corpus.txt", folder / "corpus.parquet"
        write_corpus(options.text, corpus, options.megabytes)
        write_parquet(corpus, rows)
        more = [part for change in options.set for part in ("--set", change)]
        Run(prepare_command(options.text, folder / "small", options.workers, [])).finish()  # for its tokenizer
        more += ["--tokenizer", str(folder / "small")]
        ours = Run(prepare_command(corpus, folder / "first", options.workers, more)).finish()
        report = json.loads(ours.pop("printed"))["train"]
        command = prepare_command(corpus, folder / "killed", options.workers, more)
        moments = killed_and_resumed(command, ours["seconds"], options.kills, random.Random(options.megabytes))
        peer_command = [
            str(rows),
            str(folder / "small" / "tokenizer.json"),
            str(options.workers),
            str(folder / "cache"),
        ]
        theirs = Run([sys.executable, "-c", PEER, *peer_command]).finish()
        theirs |= json.loads(theirs.pop("printed"))
        result = {
            "megabytes": options.megabytes,
            "documents": report["kept"],
            "tokens": report["tokens"],
            "workers": options.workers,
            "settings": options.set,
            "prepare": ours,
            "datasets_map": theirs,
            "datasets_map_seconds_by_prepare_seconds": round(theirs["seconds"] / ours["seconds"], 2),
            "killed_after_seconds": moments,
            "killed_and_resumed_is_byte_identical": digest(folder / "killed") == digest(folder / "first"),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "versions": {
                name: version(name) for name in ("gemmule", "tokenizers", "datasets", "transformers", "numpy")
            },
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
