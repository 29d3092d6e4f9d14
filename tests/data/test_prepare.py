import errno
import hashlib
import json
import math
import os
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from gemmule.data.dataset import Dataset, open_dataset, prepared_folder
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.data.sources import read_source
from gemmule.errors import DatasetError, OutputError, SourceError, TokenizerError
from gemmule.tokenizer import TokenizerSettings
from messages import logged

pytestmark = pytest.mark.usefixtures("without_plots")

VOCABULARY = TokenizerSettings(vocab_size=350)
SEPARATOR = "<|endoftext|>"
SYMBOLS = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "<|endoftext|>"]
WORDS = "the fox ran over hills and far away to find its little den warm dry under old oak trees by a stream"


def stories(count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS.split(), 30)) + f" in year {number} of {seed}." for number in range(count)]


def write(file: Path, documents: list[str] | list[bytes]) -> str:
    raw = [text if isinstance(text, bytes) else text.encode() for text in documents]
    file.write_bytes(f"\n{SEPARATOR}\n".encode().join(raw) + b"\n")
    return str(file)


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    return DataSettings(
        train=write(tmp_path / "train.txt", stories(200)),
        validation=write(tmp_path / "valid.txt", stories(20, seed=1)),
    )


def decoded(dataset: Dataset, split: str) -> list[str]:
    corpus = getattr(dataset, split)
    return [dataset.tokenizer.decode(corpus.read(number, 0, 10**6).tolist()) for number in range(corpus.documents)]


def test_every_document_arrives_in_order_between_bos_and_eos(settings: DataSettings, tmp_path: Path) -> None:
    dataset = prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    assert decoded(dataset, "train") == stories(200)
    assert decoded(dataset, "validation") == stories(20, seed=1)
    for number in range(20):
        ids = dataset.validation.read(number, 0, 10**6).tolist()
        assert (ids[0], ids[-1]) == (dataset.tokenizer.bos_id, dataset.tokenizer.eos_id)
        assert dataset.validation.text_bytes(number) == len(stories(20, seed=1)[number].encode())
    assert dataset.floor_nats is None


def test_report_counts_a_dirty_corpus(tmp_path: Path) -> None:
    good = [text.encode() for text in stories(300)]
    valid = stories(10, seed=1)
    mojibake = "It\u2019s a den.".encode().decode("cp1252").encode()
    dirty = [*good, b"bad \xff byte", b"  ", b"", good[3], good[4] + b" ", valid[0].encode(), mojibake]
    settings = DataSettings(
        train=write(tmp_path / "train.txt", dirty), validation=write(tmp_path / "valid.txt", [*valid, valid[1]])
    )
    dataset = prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    train, validation = dataset.report.train, dataset.report.validation
    assert (train.read, train.not_utf8, train.empty, train.duplicate, train.shared) == (307, 1, 2, 2, 1)
    assert (train.repaired, train.kept, train.held_out) == (1, 301, 0)
    assert (validation.read, validation.duplicate, validation.kept) == (11, 1, 10)
    texts = [*stories(300), "It\u2019s a den."]
    assert decoded(dataset, "train") == texts
    assert train.bytes == dataset.train.bytes == sum(len(text.encode()) for text in texts)
    assert train.tokens == dataset.train.tokens == sum(map(int, dataset.train.lengths))
    assert train.longest == dataset.train.lengths.max()
    printed = str(dataset.report)
    for line in ("documents read", "not UTF-8", "duplicates", "also in validation", "mojibake", "bytes per token"):
        assert line in printed
    assert "held out" not in printed
    assert open_dataset(tmp_path / "out").report == dataset.report


def test_documents_are_held_out_by_their_text(tmp_path: Path) -> None:
    texts = stories(1000)
    source = write(tmp_path / "train.txt", texts)
    dataset = prepare_dataset(DataSettings(train=source, holdout=0.1), VOCABULARY, tmp_path / "out")
    train, validation = decoded(dataset, "train"), decoded(dataset, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 70 <= len(validation) <= 130
    assert dataset.report.train.held_out == dataset.report.validation.kept == len(validation)
    reversed_source = write(tmp_path / "reversed.txt", texts[::-1])
    again = prepare_dataset(DataSettings(train=reversed_source, holdout=0.1), VOCABULARY, tmp_path / "again")
    assert decoded(again, "validation") == validation[::-1], "the choice must not depend on the order"


def test_a_prepared_folder_is_not_prepared_again(settings: DataSettings, tmp_path: Path) -> None:
    prepare_dataset(settings, VOCABULARY, tmp_path / "made")
    with pytest.raises(SourceError, match="made: is a prepared dataset already"):
        prepare_dataset(DataSettings(train=str(tmp_path / "made")), VOCABULARY, tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_several_sources_are_read_one_after_the_other_and_cleaned_as_one(tmp_path: Path) -> None:
    texts = stories(60)
    first = write(tmp_path / "first.txt", texts[:40])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[30:])  # ten of them again
    (tmp_path / "second.jsonl").write_text(rows, encoding="utf-8")
    both = DataSettings(train=(first, str(tmp_path / "second.jsonl")), validation=write(tmp_path / "v.txt", ["A day."]))
    dataset = prepare_dataset(both, VOCABULARY, tmp_path / "out")
    assert decoded(dataset, "train") == texts
    assert dataset.report.train.duplicate == 10
    assert dataset.report.train.source == f"{first}, {tmp_path / 'second.jsonl'}"


def test_an_existing_tokenizer_is_taken_over(settings: DataSettings, tmp_path: Path) -> None:
    first = prepare_dataset(settings, VOCABULARY, tmp_path / "first")
    reuse = TokenizerSettings(path=str(tmp_path / "first"))
    second = prepare_dataset(settings, reuse, tmp_path / "second")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(TokenizerError, match="no such file"):
        prepare_dataset(settings, TokenizerSettings(path=str(tmp_path / "nowhere")), tmp_path / "third")


def test_bytes_that_nothing_predicts_are_not_counted(settings: DataSettings, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(SYMBOLS, range(258), strict=True)), [("t", "h")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))  # like GPT-2's, it puts nothing before a text
    documents = ["then", "hen"]
    settings = settings.replace(validation=write(tmp_path / "bytes.txt", documents))
    dataset = prepare_dataset(settings, TokenizerSettings(path=str(tmp_path / "tokenizer.json")), tmp_path / "out")
    assert [dataset.validation.text_bytes(number) for number in range(2)] == [2, 2]
    assert dataset.validation.bytes == 4
    assert dataset.report.validation.bytes == 7


def test_the_floor_is_the_surprise_of_all_validation_stories(tmp_path: Path) -> None:
    settings = DataSettings(train="storybook:300", validation="storybook:20")
    dataset = prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    told = list(read_source("storybook:20", settings, "validation"))
    assert decoded(dataset, "validation") == [story.text for story in told]
    expected = -math.fsum(story.log_probability or 0.0 for story in told)
    assert dataset.floor_nats == pytest.approx(expected, rel=1e-12)
    assert open_dataset(tmp_path / "out").floor_nats == dataset.floor_nats


def test_held_out_stories_have_a_floor_too(tmp_path: Path) -> None:
    dataset = prepare_dataset(DataSettings(train="storybook:300", holdout=0.1), VOCABULARY, tmp_path / "out")
    chances = {d.text: d.log_probability or 0.0 for d in read_source("storybook:300", DataSettings(train="x"), "train")}
    assert dataset.floor_nats == pytest.approx(-sum(chances[text] for text in decoded(dataset, "validation")))


def test_progress_names_each_stage(settings: DataSettings, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int | None]] = []
    prepare_dataset(settings, VOCABULARY, tmp_path / "out", lambda *news: heard.append(news))
    assert list(dict.fromkeys(label for label, _, _ in heard)) == [
        "cleaning (bytes)",
        "deduplicating",
        "training the tokenizer",
        "tokenizing (documents)",
    ]
    assert heard[-1] == ("tokenizing (documents)", 220, 220)


# What the user gets wrong.


def fails(
    error: type[Exception], words: str, settings: DataSettings, out: Path, vocabulary: TokenizerSettings = VOCABULARY
) -> None:
    with pytest.raises(error, match=words):
        prepare_dataset(settings, vocabulary, out)
    assert not out.exists()
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)


def test_what_the_user_gets_wrong_makes_no_dataset(tmp_path: Path, settings: DataSettings) -> None:
    out = tmp_path / "out"
    fails(SourceError, r"nowhere\.txt: no such file", settings.replace(train="nowhere.txt"), out)
    fails(SourceError, r"valid2\.txt: no such file", settings.replace(validation="valid2.txt"), out)
    blank = write(tmp_path / "blank.txt", ["  ", "\n"])
    fails(
        SourceError,
        r"data\.train = .*blank\.txt: no document is left to use \(.*1 empty",
        settings.replace(train=blank),
        out,
    )
    fails(SourceError, r"data\.validation = .*blank", settings.replace(validation=blank), out)
    same = settings.replace(train=settings.validation)
    fails(SourceError, r"data\.train = .*no document is left to use \(20 read, 20 shared", same, out)
    few = DataSettings(train=write(tmp_path / "few.txt", stories(3)), holdout=0.0001)
    fails(
        SourceError,
        r"data\.holdout = 0\.0001: does not divide 3 documents of 4\d\d bytes.*use data\.holdout = 0\.\d+, set ",
        few,
        out,
    )


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path, settings: DataSettings) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(OutputError, match="out: is not empty"):
        prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"
    with pytest.raises(OutputError, match="is not empty"):
        prepare_dataset(settings, VOCABULARY, tmp_path / "out" / "thesis.txt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
@pytest.mark.parametrize("victim", ["train-00000.text", "train-00000.tokens", "validation-00000.tokens"])
def test_no_space_left_names_the_folder_and_what_is_finished_is_kept(
    victim: str, settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open: Callable[..., Any] = Path.open

    def open_on_full_device(path: Path, *args: Any, **more: Any) -> Any:
        return real_open(Path("/dev/full") if path.name == victim and "wb" in args else path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_on_full_device)
        with pytest.raises(OutputError, match="out: no space left on the device"):
            prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "clean" / "validation-00000.json").exists()
    prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_an_interruption_leaves_what_is_finished_and_no_dataset(settings: DataSettings, tmp_path: Path) -> None:
    def interrupt(label: str, *_: object) -> None:
        if label.startswith("tokenizing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(settings, VOCABULARY, tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.glob("*out*")] == [".out.partial"]


@pytest.mark.parametrize(
    ("victim", "error"),
    [
        ("gemmule.files.sync", KeyboardInterrupt()),
        ("gemmule.files._is_filled_in_place", OSError(errno.EIO, "Input/output error")),
        ("gemmule.data.prepare.atomic_replace", OSError(errno.EBUSY, "Device or resource busy")),
    ],
)
def test_a_last_step_that_fails_loses_nothing(
    victim: str, error: BaseException, settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        if (tmp_path / ".out.partial" / "encode" / "dataset" / "dataset.json").exists():
            raise error
        return original(path)

    original: Callable[[Path], Any] = pkgutil.resolve_name(victim)
    with monkeypatch.context() as patched:
        patched.setattr(victim, fail)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    made = tmp_path / ".out.partial" / "encode" / "dataset"
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    assert "dataset.json" in before
    heard: list[str] = []
    prepare_dataset(settings, VOCABULARY, tmp_path / "out", lambda label, *_: heard.append(label))
    assert heard == []
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / ".out.partial").exists()


def test_what_came_into_the_folder_meanwhile_is_kept_as_is_the_dataset(settings: DataSettings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    notes = out / "notes.txt"
    with pytest.raises(OutputError, match="another program wrote into it meanwhile; the finished output is kept"):
        prepare_dataset(
            settings, VOCABULARY, out, lambda *_: None if notes.exists() else notes.write_text("weeks") and None
        )
    assert notes.read_text() == "weeks"
    with pytest.raises(OutputError, match="is not empty"):
        prepare_dataset(settings, VOCABULARY, out)
    notes.rename(tmp_path / "notes.txt")
    prepare_dataset(settings, VOCABULARY, out, lambda label, *_: pytest.fail(label))


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_folder_that_cannot_be_renamed_is_filled_and_filling_goes_on(
    moves: int, settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current directory, here, as a mounted volume."""
    prepare_dataset(settings, VOCABULARY, tmp_path / "expected")
    (tmp_path / "volume").mkdir()
    monkeypatch.chdir(tmp_path / "volume")
    rename = Path.rename

    def rename_some(path: Path, target: Path) -> Path:
        nonlocal moves
        if path.parent.name == "dataset":
            moves -= 1
            if moves < 0:
                raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    for out in (Path(), tmp_path / "volume"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename_some)
            with pytest.raises(OutputError, match="Input/output error"):
                prepare_dataset(settings, VOCABULARY, out)
    assert (tmp_path / "volume" / ".partial").exists()
    prepare_dataset(settings, VOCABULARY, Path())
    made, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("volume", "expected")
    )
    assert made == expected


def test_a_folder_may_hold_files_whose_names_are_not_utf8(settings: DataSettings, tmp_path: Path) -> None:
    """Their own names are refused, as no recipe could be written with them."""
    (tmp_path / "texts").mkdir()
    file = tmp_path / "texts" / os.fsdecode(b"caf\xe9.txt")
    shutil.copy(settings.train[0], file)
    made = settings.replace(train=str(file.parent))
    dataset = prepare_dataset(made, VOCABULARY, tmp_path / os.fsdecode(b"o\xfft"))
    assert dataset.train.documents == prepare_dataset(settings, VOCABULARY, tmp_path / "expected").train.documents
    with pytest.raises(ValueError, match="valid string"):
        settings.replace(train=str(file))


def test_a_prepared_folder_may_be_named_from_home(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(settings, VOCABULARY, tmp_path / "made")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared_folder(DataSettings(train="~/made")) == tmp_path / "made"
    assert prepared_folder(DataSettings(train="~/nothing")) is None
    with pytest.raises(SourceError, match="is a prepared dataset, not text; train on it alone"):
        prepare_dataset(DataSettings(train=("~/made", "~/made")), VOCABULARY, tmp_path / "again")


def test_a_tokenizer_that_loses_text_is_noticed(settings: DataSettings, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "<eos>": 1, "the": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    library.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "unk_token": "[UNK]"}')
    words = TokenizerSettings(path=str(tmp_path / "words"))
    with logged() as said:
        dataset = prepare_dataset(settings, words, tmp_path / "out")
    assert said == [
        "the tokenizer changes 220 of 220 documents: decoding does not restore the text, so bits per byte are "
        "meaningless"
    ]
    assert not dataset.lossless
    assert not open_dataset(tmp_path / "out").lossless
    assert prepare_dataset(settings, VOCABULARY, tmp_path / "whole").lossless
    assert "lossless" not in json.loads((tmp_path / "whole" / "dataset.json").read_text())


@pytest.fixture
def prepared(settings: DataSettings, tmp_path: Path) -> Path:
    prepare_dataset(settings, VOCABULARY, tmp_path / "out")
    return tmp_path / "out"


def test_folders_that_are_not_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.json: cannot be read \(No such file"):
        open_dataset(tmp_path)


def test_damaged_datasets_are_refused(prepared: Path) -> None:
    for name, words in [("dataset.json", "damaged"), ("report.json", "damaged"), ("train-00000.tokens", "truncated")]:
        whole = (prepared / name).read_bytes()
        (prepared / name).write_bytes(whole[:-9])
        with pytest.raises(DatasetError, match=words):
            open_dataset(prepared)
        (prepared / name).write_bytes(whole)


def test_changed_tokens_are_noticed_where_a_dataset_is_opened(prepared: Path) -> None:
    shard = prepared / "train-00000.tokens"
    whole = bytearray(shard.read_bytes())
    whole[1000:1002] = whole[1002:1004]
    shard.write_bytes(whole)
    with pytest.raises(DatasetError, match=r"train-00000\.tokens: damaged \(its checksum differs\)"):
        open_dataset(prepared)
    assert open_dataset(prepared, verify=False).train.documents == 200


def test_tokens_that_the_vocabulary_lacks_are_refused(prepared: Path) -> None:
    shard = prepared / "validation-00000.tokens"
    whole = bytearray(shard.read_bytes())
    whole[130:132] = b"\xff\xff"
    whole[72:104] = hashlib.sha256(whole[128:]).digest()
    shard.write_bytes(whole)
    with pytest.raises(DatasetError, match=r"validation-00000\.tokens: holds token 65535, where .* has 350 ids"):
        open_dataset(prepared)


def test_documents_that_overlap_are_refused(prepared: Path) -> None:
    shard = prepared / "train-00000.tokens"
    whole = bytearray(shard.read_bytes())
    whole[-8 * 2 * 200 : -8 * 2 * 200 + 8] = (10**9).to_bytes(8, "little")
    shard.write_bytes(whole)
    with pytest.raises(DatasetError, match=r"damaged \(its documents do not fill it"):
        open_dataset(prepared, verify=False)


def test_shards_of_another_tokenizer_are_refused(prepared: Path, settings: DataSettings, tmp_path: Path) -> None:
    prepare_dataset(settings, TokenizerSettings(vocab_size=340), tmp_path / "other")
    (prepared / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(DatasetError, match=r"train-00000\.tokens: made with another tokenizer \(fingerprint"):
        open_dataset(prepared)
