"""What is in the repository stands on its own: no path of somebody's machine, no package index."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Home and work folders, folders beside the project, hosts that packages come from; in pieces, not to be found here.
FOREIGN = re.compile(
    "|".join(
        [r"/(?:home|root|Users|" + "work)/", r"\.\./" + "shared", "py" + r"pi\.", "python" + "hosted", "index" + "-url"]
    )
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_names_a_place_outside_the_project() -> None:
    named = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or deleted and not yet committed
            continue
        named += [f"{file.relative_to(ROOT)}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert named == []


def test_what_runs_leave_behind_is_not_tracked() -> None:
    left = {".tokens", ".safetensors", ".pyc"}
    assert [file for file in tracked() if file.suffix in left or "runs" in file.relative_to(ROOT).parts] == []
