import json
from pathlib import Path

from gemmule.data.dataset import open_dataset
from runs import gemmule, write_text


def test_a_dataset_folder_is_made_and_reported(tmp_path: Path) -> None:
    write_text(tmp_path / "train.txt", 50)
    text = (tmp_path / "train.txt").read_text()
    twice = text.split("<|endoftext|>")[0]
    (tmp_path / "train.txt").write_text(text + twice + "<|endoftext|>\n \n")
    write_text(tmp_path / "valid.txt", 10, seed=1)
    out = tmp_path / "dataset"
    options = ["--validation", tmp_path / "valid.txt", "--vocab-size", 300, "--out", out, "--json"]
    ended = gemmule("prepare", tmp_path / "train.txt", *options)
    assert ended.code == 0
    report = json.loads(ended.out)
    assert (report["train"]["kept"], report["train"]["duplicate"], report["validation"]["kept"]) == (50, 1, 10)
    assert f'data.train = "{out}"' in ended.err
    assert "dropped: duplicates" in ended.err
    dataset = open_dataset(out)
    assert (dataset.train.documents, dataset.tokenizer.vocab_size) == (50, 300)
    assert report["train"]["tokens"] == dataset.train.tokens


def test_several_sources_make_one_dataset(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", 300)
    write_text(tmp_path / "b.txt", 200, seed=1)
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    ended = gemmule("prepare", *sources, "--validation", "storybook:5", "--vocab-size", 300, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert open_dataset(tmp_path / "out").train.documents == 500


def test_an_existing_vocabulary_is_used(tiny_run: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "train.txt", 300)
    options = ["--tokenizer", tiny_run / "model", "--out", tmp_path / "dataset"]
    assert gemmule("prepare", tmp_path / "train.txt", *options).code == 0
    used, given = (open_dataset(folder).tokenizer for folder in (tmp_path / "dataset", tiny_run / "data"))
    assert used.fingerprint == given.fingerprint
