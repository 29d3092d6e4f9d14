"""Compressed files: cut at any byte, they are refused, or complete."""

import gzip
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from source_files import ROWS, json_lines, texts, write, write_parquet

from gemmule.data import streams
from gemmule.errors import SourceError

DOCUMENTS = [f"story {number} of {number * number}" for number in range(3000)]
TEXT = "<|end|>".join(DOCUMENTS).encode()
HALVES = (TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :])
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"


def gz(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


def zstd(text: bytes, sized: bool = True) -> bytes:
    library = pytest.importorskip("zstandard")
    compressor = library.ZstdCompressor(write_checksum=True)
    if sized:
        return bytes(compressor.compress(text))
    stream = compressor.compressobj()  # as from a pipe: the frame does not say how much it holds
    return bytes(stream.compress(text) + stream.flush())


def parquet(folder: Path) -> bytes:
    return write_parquet(folder / "whole.parquet", list(DOCUMENTS)).read_bytes()


def outcome(file: Path) -> str | list[str | bytes]:
    try:
        return texts(file)
    except SourceError as error:
        return "refused" if file.name in str(error) else str(error)


def _boundaries(whole: bytes) -> Iterator[int]:
    """Yield where a file of several members or frames could end as well."""
    parts = [*map(gz, HALVES), *(zstd(half, sized) for half in HALVES for sized in (True, False)), SKIPPABLE]
    for part in parts:
        place = whole.find(part)
        while place >= 0:
            yield from (place, place + len(part))
            place = whole.find(part, place + 1)


FORMS: dict[str, Callable[[Path], bytes]] = {
    "one member.txt.gz": lambda _: gz(TEXT),
    "members.txt.gz": lambda _: b"".join(map(gz, HALVES)),
    "frame.txt.zst": lambda _: zstd(TEXT),
    "frame from a pipe.txt.zst": lambda _: zstd(TEXT, sized=False),
    "frames.txt.zst": lambda _: b"".join(map(zstd, HALVES)),
    "frames from pipes.txt.zst": lambda _: b"".join(zstd(half, sized=False) for half in HALVES),
    "skippable frames.txt.zst": lambda _: SKIPPABLE + zstd(HALVES[0]) + SKIPPABLE + zstd(HALVES[1]) + SKIPPABLE,
    "table.parquet": parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_at_any_byte_is_refused_or_complete(form: str, tmp_path: Path) -> None:
    whole = FORMS[form](tmp_path)
    file = write(tmp_path / form, whole)
    assert texts(file) == DOCUMENTS
    draw = random.Random(form)
    ends = {*range(1, 9), *range(len(whole) - 8, len(whole)), *(draw.randrange(1, len(whole)) for _ in range(60))}
    # Where a member or a frame ends the file is whole, as far as anybody can tell.
    for end in ends - set(_boundaries(whole)):
        write(file, whole[:end])
        assert outcome(file) in ("refused", DOCUMENTS), f"cut at byte {end} of {len(whole)}"


def test_all_frames_of_a_file_are_read(tmp_path: Path) -> None:
    content = b"".join(zstd(line) for line in json_lines(ROWS).splitlines(keepends=True))
    assert texts(write(tmp_path / "a.jsonl.zst", content)) == ROWS


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    packed, frame = gzip.compress(json_lines(ROWS * 100)), zstd(json_lines(ROWS * 100))
    for name, content in [
        ("a.jsonl.gz", packed[: len(packed) // 2]),
        ("b.jsonl.gz", b"junk" + packed),
        ("c.jsonl.gz", packed[:20] + b"zzzz" + packed[24:]),
        ("d.jsonl.zst", b"junk" + frame),
        ("e.jsonl.zst", frame + b"junk"),
        ("f.jsonl.zst", frame[:40] + b"zzzz" + frame[44:]),
    ]:
        with pytest.raises(SourceError, match=name.replace(".", r"\.") + ": cannot be read"):
            texts(write(tmp_path / name, content))


def test_a_truncated_zstd_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.txt\.zst: cannot be read \(truncated: it ends within a compressed fra"):
        texts(write(tmp_path / "a.txt.zst", zstd(TEXT)[:-1]))


def test_a_window_beyond_the_library_s_default_is_read(tmp_path: Path) -> None:
    library = pytest.importorskip("zstandard")

    def with_window(log: int) -> bytes:
        parameters = library.ZstdCompressionParameters.from_level(3, window_log=log, write_content_size=False)
        stream = library.ZstdCompressor(compression_params=parameters).compressobj()
        return bytes(stream.compress(TEXT) + stream.flush())

    assert texts(write(tmp_path / "a.txt.zst", with_window(28))) == DOCUMENTS
    beyond = with_window(31)
    with pytest.raises(
        SourceError, match=r"more than 512 MiB of memory.*decompress it first: zstd -d --long=31 a\.txt\.zst"
    ):
        texts(write(tmp_path / "a.txt.zst", beyond))


def test_a_frame_that_expands_without_end_is_read_little_by_little(tmp_path: Path) -> None:
    file = streams.File(str(write(tmp_path / "a.txt.zst", zstd(bytes(1 << 28)))))
    with streams.open_bytes(file) as stream:
        assert len(stream.read(1 << 20)) == 1 << 20
        raw = stream.raw  # type: ignore[attr-defined]
        assert len(raw._text) <= streams._ZSTD_BLOCK << 15


def test_suffixes_are_read_in_either_case(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "A.JSONL.GZ", gzip.compress(json_lines(ROWS)))) == ROWS
    assert texts(write(tmp_path / "A.Txt", "one")) == ["one"]


def test_reading_a_block_needs_no_seeking() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with streams.COMPRESSIONS[".zst"](Pipe(zstd(TEXT)), streams.File("a.txt.zst")) as stream:
        assert stream.read() == TEXT
