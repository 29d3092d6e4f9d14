import random
import tempfile
from pathlib import Path

import pytest
from corpora import FINGERPRINT, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.corpus import Corpus, check_corpus, open_corpus
from gemmule.data.shards import ShardHeader, ShardWriter, open_shard, verify_shard
from gemmule.errors import DatasetError


@given(
    documents=st.lists(
        st.tuples(st.lists(st.integers(0, 65_535), min_size=1, max_size=9), st.integers(0, 99)), min_size=1
    ),
    wide=st.booleans(),
    largest=st.sampled_from([1, 10, 1000]),
)
def test_what_is_written_is_read(documents: list[tuple[list[int], int]], wide: bool, largest: int) -> None:
    ids, sizes = [document for document, _ in documents], [size for _, size in documents]
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), ids, sizes, vocab_size=100_000 if wide else 65_536, largest=largest)
        assert corpus.documents == len(ids)
        assert corpus.tokens == sum(map(len, ids))
        assert corpus.bytes == sum(sizes)
        assert corpus.lengths.tolist() == list(map(len, ids))
        assert [corpus.read(number, 0, 99).tolist() for number in range(len(ids))] == ids
        assert [corpus.text_bytes(number) for number in range(len(ids))] == sizes
        assert corpus.read(len(ids) - 1, 1, 3).tolist() == ids[-1][1:3]
        assert {shard.header.token_width for shard in corpus.shards} == {4 if wide else 2}
        for shard in corpus.shards:
            verify_shard(shard, 1 << 22)


def test_large_vocabularies_keep_large_ids(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[262_143, 1]], vocab_size=262_144)
    assert corpus.read(0, 0, 2).tolist() == [262_143, 1]


def test_shards_roll_over_at_their_limit(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[1] * 10] * 5, largest=40)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"train-{n:05d}.tokens" for n in range(3)]
    assert [shard.header.documents for shard in corpus.shards] == [2, 2, 1]


def test_documents_beyond_the_last_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[1, 2]])
    for number in (1, -1):
        with pytest.raises(IndexError):
            corpus.read(number, 0, 1)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_corpus(tmp_path, [[1, 2, 3], [4, 5]])
    return tmp_path / "train-00000.tokens"


def test_truncated_shard_says_how_much_is_there(shard: Path) -> None:
    whole = shard.read_bytes()
    for length in (len(whole) - 1, 130):
        shard.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=rf"truncated: {length} bytes, expected {len(whole)}"):
            open_shard(shard, FINGERPRINT)
    for length in (100, 8, 3):
        shard.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=rf"truncated: {length} bytes"):
            open_shard(shard, FINGERPRINT)


def test_files_that_are_no_shards_are_refused(shard: Path) -> None:
    whole = shard.read_bytes()
    for content, words in [
        (b"", "not a token shard"),
        (b"Once upon a time" * 20, "not a token shard"),
        (whole + b"x", "damaged"),
        (whole[:8] + b"\x09" + whole[9:], "version 9"),
        (whole[:12] + b"\x03" + whole[13:], "header makes no sense"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(DatasetError, match=words):
            open_shard(shard, FINGERPRINT)
    shard.unlink()
    with pytest.raises(DatasetError, match="No such file"):
        open_shard(shard, FINGERPRINT)


def test_another_tokenizer_is_named(shard: Path) -> None:
    with pytest.raises(DatasetError, match=r"another tokenizer \(fingerprint abababababab, this one is cdcdcdcdcdcd\)"):
        open_shard(shard, "cd" * 32)


def test_every_changed_byte_after_the_header_is_noticed(shard: Path) -> None:
    whole = bytearray(shard.read_bytes())
    for place in range(128, len(whole)):
        changed = whole.copy()
        changed[place] ^= 1
        shard.write_bytes(changed)
        with pytest.raises(DatasetError, match="damaged"):
            verify_shard(open_shard(shard, FINGERPRINT), 1000)


def test_header_takes_128_bytes(shard: Path) -> None:
    header = open_shard(shard, FINGERPRINT).header
    assert header.index_start == 128 + 16  # five tokens of two bytes, padded to a multiple of eight
    assert header.file_size == shard.stat().st_size
    assert isinstance(header, ShardHeader)


def test_an_unfinished_shard_is_not_taken_for_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train-00000.tokens", FINGERPRINT, 1000)
    writer.append([1, 2, 3], 3)
    writer.close()
    with pytest.raises(DatasetError, match="not a token shard"):
        open_shard(tmp_path / "train-00000.tokens", FINGERPRINT)


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[1, 2, 3], [4, 5]])
    check_corpus(corpus, 4)
    with pytest.raises(
        DatasetError, match=r"train\.context = 5: the corpus has 5 tokens .* train\.context = 4 or less"
    ):
        check_corpus(corpus, 5)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[1] * 10] * 2, largest=10)
    (tmp_path / "train-00001.tokens").unlink()
    with pytest.raises(DatasetError, match=r"train-00001\.tokens"):
        open_corpus(tmp_path, ["train-00000.tokens", "train-00001.tokens"], FINGERPRINT)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_a_loss_mask_is_kept_bit_by_bit(lengths: list[int], seed: int) -> None:
    draw = random.Random(seed)
    masks = [[draw.random() < 0.5 for _ in range(length)] for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-00000.tokens"
        writer = ShardWriter(path, FINGERPRINT, 1000, masked=True)
        for mask in masks:
            writer.append(range(len(mask)), 3, mask)
        writer.finalize()
        shard = open_shard(path, FINGERPRINT)
        verify_shard(shard, 1000)
        corpus = Corpus([shard])
        for document, mask in enumerate(masks):
            start = draw.randrange(len(mask))
            assert corpus.read_mask(document, start, len(mask) + 1).tolist() == mask[start:]
    assert shard.header.version == 2
