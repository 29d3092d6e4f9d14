import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import gemmule as package
from gemmule.formats import trim as formats
from gemmule.tokenizer import trim as trimming
from gemmule.tokenizer.chat import CHAT_TEMPLATE
from runs import Ended, gemmule, write_text

GREEDY = ["--max-new-tokens", 16, "--temperature", 0]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few documents of the kind that the run was trained on, some of them twice."""
    text = "\n<|endoftext|>\n".join(["Mia found the key.", "Tom saw two eggs. The end.", "Mia found the key."])
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus.txt"


def complaint(ended: Ended) -> str:
    assert (ended.code, ended.out) == (2, "")
    sentence = ended.err.rpartition("gemmule: ")[2]
    assert sentence.count("\n") == 1
    return sentence.removesuffix("\n")


def test_a_trimmed_run_is_the_same_model(tiny_run: Path, tiny_recipe: Path, corpus: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tiny_recipe.parent / "valid.txt"
    ended = gemmule("trim", tiny_run, "--corpus", corpus, "--held-out", other, "--out", out, "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    before, after = package.load(tiny_run), package.load(out)
    assert (figures["ids_before"], figures["ids"]) == (before[1].vocab_size, after[1].vocab_size)
    for key, model in (("parameters_before", before[0]), ("parameters", after[0])):
        assert figures[key] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters"] < figures["parameters_before"]
    assert figures["corpus"]["documents"] == 3
    assert figures["corpus"]["changed"] == 0
    assert figures["corpus"]["tokens"] == figures["corpus"]["tokens_before"] == figures["positions"]
    assert figures["held_out"]["documents"] == 24
    assert figures["held_out"]["tokens"] > figures["held_out"]["tokens_before"]
    lines = ended.err.splitlines()
    assert f"ids: {figures['ids_before']} -> {figures['ids']} ({figures['ids'] / figures['ids_before']:.1%})" in lines
    assert f"logits: equal at {figures['positions']} positions, to the last bit" in lines
    assert f"{corpus}: 0 of 3 documents are encoded differently" in lines
    assert any(line.startswith(f"{other}: ") and "tokens: " in line for line in lines)
    assert lines[-1] == f"wrote {out}; try it:  gemmule generate {out}"
    old_ids = json.loads((out / "vocabulary.json").read_text())["old_ids"]
    text = "Mia found the key."
    assert [old_ids[token] for token in after[1].encode(text)] == before[1].encode(text)
    kept = torch.tensor(old_ids)
    with torch.no_grad():
        logits = before[0](torch.tensor([before[1].encode(text)]))[..., kept]
        assert torch.allclose(after[0](torch.tensor([after[1].encode(text)])), logits, atol=1e-5)


def test_generated_text_is_the_originals_restricted_to_the_kept_ids(
    tiny_run: Path, corpus: Path, tmp_path: Path
) -> None:
    prompt, out = "Mia found", tmp_path / "out"
    assert gemmule("trim", tiny_run, "--corpus", corpus, "--out", out).code == 0
    kept = json.loads((out / "vocabulary.json").read_text())["old_ids"]
    network, tokenizer = package.load(tiny_run)
    assert len(kept) < tokenizer.vocab_size
    events = list(package.generate(*package.load(out), prompt, max_new_tokens=16, temperature=0))
    ids = tokenizer.encode(prompt)
    for event in events:
        with torch.no_grad():
            best = int(network(torch.tensor([ids]))[0, -1, kept].argmax())
        assert event.token == best
        ids.append(kept[best])
    ended = gemmule("generate", out, "--prompt", prompt, *GREEDY)
    assert ended.out.rstrip("\n") == (prompt + "".join(event.text for event in events)).rstrip("\n")


@pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf library is not installed")
def test_exports_and_gguf_files_can_be_trimmed_and_exported(tiny_run: Path, corpus: Path, tmp_path: Path) -> None:
    whole, out, again = tmp_path / "whole.gguf", tmp_path / "out", tmp_path / "again.gguf"
    assert gemmule("export", tiny_run, "--to", "gguf", "--dtype", "f32", "--out", whole).code == 0
    assert gemmule("trim", whole, "--corpus", corpus, "--out", out).code == 0
    assert gemmule("export", out, "--to", "gguf", "--dtype", "f32", "--out", again).code == 0
    words = ["--prompt", "Mia found", *GREEDY]
    assert gemmule("generate", again, *words).out == gemmule("generate", out, *words).out
    assert again.stat().st_size < whole.stat().st_size


def test_chat_template_and_notices_follow(tiny_run: Path, corpus: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(tiny_run / "model", tmp_path / "source"), tmp_path / "out"
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (source / "README.md").write_text("---\nlicense: gemma\nmodel_name: Tiny\n---\n")
    (source / "NOTICE").write_text("Gemma")
    ended = gemmule("trim", source, "--corpus", corpus, "--out", out)
    assert ended.code == 0, ended.err
    assert f"license of {source}: gemma; it also applies to this copy" in ended.err
    assert package.load(out)[1].chat_template == CHAT_TEMPLATE
    assert (out / "NOTICE").read_text() == "Gemma"
    assert "# Tiny, trimmed" in (out / "README.md").read_text()


def test_size_and_minimum_count(tiny_run: Path, corpus: Path, tmp_path: Path) -> None:
    needed = json.loads(gemmule("trim", tiny_run, "--corpus", corpus, "--out", tmp_path / "a", "--json").out)["ids"]
    ended = gemmule("trim", tiny_run, "--corpus", corpus, "--size", needed + 3, "--out", tmp_path / "b", "--json")
    assert json.loads(ended.out)["ids"] == needed + 3
    ended = gemmule("trim", tiny_run, "--corpus", corpus, "--min-count", 2, "--out", tmp_path / "c", "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    assert figures["ids"] < needed
    assert figures["dropped"] > 0
    assert (figures["corpus"]["documents"], figures["corpus"]["changed"]) == (3, 1), "the one that is there once"
    assert f"--min-count 2: drops {figures['dropped']} ids that the corpus has" in ended.err
    assert f"{corpus}: 1 of 3 documents are encoded differently; tokens: " in ended.err


def test_a_corpus_is_read_as_for_training(tiny_run: Path, tmp_path: Path) -> None:
    """Documents that are not UTF-8 are dropped, mojibake and line ends are repaired, columns are named."""
    rows = [json.dumps({"story": f"Mia saw {number} caf\u00c3\u00a9s.\r\nThe end."}).encode() for number in range(200)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    ended = gemmule(
        "trim", tiny_run, "--corpus", tmp_path / "rows.jsonl", "--column", "story", "--out", tmp_path / "a", "--json"
    )
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["corpus"]["documents"] == 200
    documents = [b"Mia found the key."] * 150 + [b"caf\xe9 \xff"]
    (tmp_path / "bytes.txt").write_bytes(b"\n<|endoftext|>\n".join(documents))
    ended = gemmule("trim", tiny_run, "--corpus", tmp_path / "bytes.txt", "--out", tmp_path / "b", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["corpus"]["documents"] == 150


def test_standard_input_and_the_storybook(tiny_run: Path, tmp_path: Path) -> None:
    ended = gemmule("trim", tiny_run, "--corpus", "-", "--out", tmp_path / "a", "--json", given=b"Mia found the key.")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["corpus"]["documents"] == 1
    words = ["--corpus", "storybook:20", "--held-out", "storybook:20", "--out", tmp_path / "b", "--json"]
    figures = json.loads(gemmule("trim", tiny_run, *words).out)
    assert figures["corpus"]["documents"] == figures["held_out"]["documents"] == 20
    assert figures["corpus"]["tokens_before"] != figures["held_out"]["tokens_before"], "other stories are held out"
    assert figures["positions"] == 256


def test_warnings_of_reading_come_once(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("Mia found the key.")
    ended = gemmule("trim", tiny_run, "--corpus", tmp_path / "plain.txt", "--out", tmp_path / "out")
    assert ended.err.count("does not occur in") == 1
    assert logging.getLogger("gemmule.data").level == logging.NOTSET


@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_a_failed_proof_writes_nothing(
    tiny_run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    if part == "tokenizer":
        # As if the closure over merges were forgotten.
        monkeypatch.setattr(trimming._Vocabulary, "closure", lambda self, tokens: set(tokens))
        sentence = f"gemmule: {corpus}: 3 documents would be encoded differently; nothing was written\n"
    else:
        monkeypatch.setattr(formats, "logits_are_equal", lambda *_: False)
        sentence = "gemmule: the logits of the trimmed model differ from the model's; nothing was written\n"
    ended = gemmule("trim", tiny_run, "--corpus", corpus, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.endswith(sentence)
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.txt"]


def test_bad_input_ends_in_a_sentence_and_writes_nothing(tiny_run: Path, corpus: Path, tmp_path: Path) -> None:
    out, blank = tmp_path / "out", tmp_path / "blank.txt"
    blank.write_text(" \n<|endoftext|>\n")

    def refused(*options: object, model: object = tiny_run, text: object = corpus) -> str:
        sentence = complaint(gemmule("trim", model, "--corpus", text, "--out", out, *options))
        assert not out.exists()
        return sentence

    assert refused(model=tmp_path / "nowhere").startswith(f"MODEL {tmp_path / 'nowhere'}: no such folder")
    assert refused(text=tmp_path / "none.txt").startswith(f"{tmp_path / 'none.txt'}: no such file")
    expected = f"{blank}: there is no text to keep a vocabulary of (dropped: 1 empty)"
    assert refused(text=blank) == refused("--held-out", blank) == expected
    assert refused(text=tiny_run / "data").endswith("is a prepared dataset; name the text that it was made from")
    number = refused("--size", 270).split("needs ")[1].split()[0]
    assert refused("--size", 270) == (
        f"--size 270: the corpus needs {number} ids; use {number} or more, or drop rare ones by --min-count"
    )
    assert refused("--size", 9999) == (
        "--size 9999: the vocabulary has 320 ids, of which 320 stand for text or are needed; use 320 or less"
    )
    assert list(tmp_path.glob(".*")) == [], "nothing temporary is left"


def test_an_output_that_is_there_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("mine")
    ended = gemmule("trim", tmp_path / "no model", "--corpus", corpus, "--out", tmp_path / "out")
    assert complaint(ended).endswith("already exists and is not empty; choose a new or empty folder")
    assert (tmp_path / "out" / "thesis").read_text() == "mine"


def test_a_tokenizer_of_another_kind_is_refused(tiny_run: Path, corpus: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_run / "model", tmp_path / "source")
    description = json.loads((source / "tokenizer.json").read_text())
    description["model"]["byte_fallback"] = False
    (source / "tokenizer.json").write_text(json.dumps(description))
    ended = gemmule("trim", source, "--corpus", corpus, "--out", tmp_path / "out")
    assert complaint(ended) == (
        "the model's tokenizer is byte-pair encoding without byte fallback; only byte-pair encoding with byte "
        "fallback can be trimmed, such as Gemma's and Gemmule's"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
def test_transformers_opens_the_folder(tiny_run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out, corpus = tmp_path / "out", write_text(tmp_path / "corpus.txt", 20)
    assert gemmule("trim", tiny_run, "--corpus", corpus, "--out", out).code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours, own = package.load(out)
    ids = tokenizer("Mia found a red kite", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == own.encode("Mia found a red kite")
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4)
