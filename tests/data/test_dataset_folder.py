"""The folder of a prepared dataset: its files, and the same bytes each time."""

import json
from pathlib import Path

from gemmule.data.dataset import open_dataset
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.data.shards import verify_shard
from gemmule.tokenizer import TokenizerSettings
from runs import write_text


def test_the_folder_holds_what_the_formats_page_says_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    train, validation = write_text(tmp_path / "train.txt", 200), write_text(tmp_path / "valid.txt", 20, seed=1)
    settings = DataSettings(train=(str(train),), validation=(str(validation),))
    out, again = tmp_path / "deep" / "out", tmp_path / "again"
    for folder in (out, again):
        prepare_dataset(settings, TokenizerSettings(vocab_size=320), folder)
    assert sorted(file.name for file in out.iterdir()) == [
        "dataset.json",
        "report.json",
        "report.png",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.tokens",
        "validation-00000.tokens",
    ]
    assert json.loads((out / "dataset.json").read_text())["settings"]["train"] == list(settings.train)
    for corpus in (open_dataset(out).train, open_dataset(out).validation):
        verify_shard(corpus.shards[0], 320)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
