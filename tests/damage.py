"""What can happen to the files of a checkpoint: by a crash, a disk, or a hand."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = Callable[[Path, Path], None]  # (file, the same file of an older checkpoint)


def truncated(share: float) -> Damage:
    """Leave a share of a file, and never all that means something."""
    return lambda file, _: os.truncate(file, min(int(file.stat().st_size * share), file.stat().st_size - 2))


def flipped(share: float) -> Damage:
    """Change one bit, at a share of the file."""

    def flip(file: Path, _: Path) -> None:
        content = bytearray(file.read_bytes())
        content[min(int(len(content) * share), len(content) - 2)] ^= 1
        file.write_bytes(content)

    return flip


def zeroed(file: Path, _: Path) -> None:
    """Leave the size and lose a block, as a disk without power does."""
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 3, len(content) // 3 + 512)
    content[middle] = bytes(len(content[middle]))
    file.write_bytes(content)


def longer(file: Path, _: Path) -> None:
    """Append what is not of the file."""
    with file.open("ab") as end:
        end.write(b"{}")


def foreign(file: Path, older: Path) -> None:
    """Put the same file of an older checkpoint in its place, which is whole in itself."""
    shutil.copy(older, file)


def folder(file: Path, _: Path) -> None:
    """Put a folder in its place."""
    file.unlink()
    file.mkdir()


def nowhere(file: Path, _: Path) -> None:
    """Put a link in its place that leads nowhere."""
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES: dict[str, Damage] = {
    "empty": truncated(0),
    "a tenth": truncated(0.1),
    "half": truncated(0.5),
    "all but the end": truncated(1),
    "first bit": flipped(0),
    "early bit": flipped(0.3),
    "middle bit": flipped(0.5),
    "late bit": flipped(0.8),
    "last bits": flipped(1),
    "a block of zeros": zeroed,
    "longer": longer,
    "of another checkpoint": foreign,
    "missing": lambda file, _: file.unlink(),
    "a folder": folder,
    "a link to nowhere": nowhere,
}


def damaged(newest: Path, older: Path) -> Iterator[tuple[str, str]]:
    """Damage each file of a checkpoint in each way, yield both, and mend it after that."""
    for name in sorted(file.name for file in newest.iterdir()):
        file, whole = newest / name, (newest / name).read_bytes()
        for how, damage in DAMAGES.items():
            damage(file, older / name)
            if not file.is_file() or file.read_bytes() != whole:  # the tokenizer is the same at all steps
                yield name, how
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(whole)
