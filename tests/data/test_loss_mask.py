"""Shards of conversations and preferences: what is trained on is what the report says, and the shards hold."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from source_files import write

from gemmule.data.corpus import Corpus, open_corpus
from gemmule.data.dataset import Dataset, open_dataset
from gemmule.data.loss_mask import ROLES, check_loss_mask, segments, token_roles
from gemmule.data.prepare import prepare_dataset
from gemmule.data.rendering import read_prompts
from gemmule.data.settings import DataSettings
from gemmule.data.shards import ShardWriter
from gemmule.errors import DatasetError, RecipeError, TokenizerError
from gemmule.tokenizer import Tokenizer, TokenizerSettings
from gemmule.tokenizer.chat import render_chat

pytestmark = pytest.mark.usefixtures("without_plots")

SYSTEM = {"role": "system", "content": "Be brief."}


def conversation(number: int) -> dict[str, Any]:
    words = [f"Ask {number}", f"Reply {number}", "<bos>And<end_of_turn>\n<start_of_turn>model\n", f"Last {number}"]
    turns = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]
    return {"messages": [*([SYSTEM] if number % 2 else []), *turns[: 2 + 2 * (number % 3 == 0)]]}


def prepared(folder: Path, rows: list[dict[str, Any]], kind: str, tokenizer: Tokenizer, **settings: Any) -> Dataset:
    source = write(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings.model_validate({"train": str(source), "kind": kind, "holdout": 0.2, **settings})
    prepare_dataset(data, tokenizer, folder / "data")
    return open_dataset(folder / "data")


def documents(corpus: Corpus) -> list[tuple[list[int], list[bool]]]:
    return [
        (corpus.read(number, 0, int(length)).tolist(), corpus.read_mask(number, 0, int(length)).tolist())
        for number, length in enumerate(corpus.lengths)
    ]


def test_shards_hold_what_the_renderer_gives(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [conversation(number) for number in range(40)]
    dataset = prepared(tmp_path, rows, "conversations", tiny_tokenizer)
    wanted = sorted(tuple(render_chat(tiny_tokenizer, row["messages"])) for row in rows)
    assert sorted([*documents(dataset.train), *documents(dataset.validation)]) == wanted
    assert dataset.lossless


def test_the_report_counts_by_role_what_is_trained(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [conversation(number) for number in range(40)]
    dataset = prepared(tmp_path, rows, "conversations", tiny_tokenizer)
    reports = [split.loss_mask for split in (dataset.report.train, dataset.report.validation)]
    replies = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    trained = sum(len(tiny_tokenizer.encode(reply)) for reply in replies)  # bos stands in for <end_of_turn>
    found = [report for report in reports if report is not None]
    assert len(found) == 2
    assert sum(report.trained_tokens for report in found) == trained
    assert sum(report.tokens["model"] for report in found) == trained
    assert [report.trained["user"] + report.trained["template"] for report in found] == [0, 0]
    assert sum(sum(report.tokens.values()) for report in found) == dataset.train.tokens + dataset.validation.tokens
    assert sum(report.replies for report in found) == sum(report.ended for report in found) == len(replies)
    assert sum(report.special_spellings for report in found) == sum(len(row["messages"]) > 3 for row in rows)
    assert re.search(r"train: [\d,]+ of [\d,]+ tokens \(\d+\.\d%\) are trained: template 0 of", str(dataset.report))


def test_bytes_are_those_of_the_replies(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [conversation(number) for number in range(40)]
    dataset = prepared(tmp_path, rows, "conversations", tiny_tokenizer)
    replies = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    assert dataset.train.bytes + dataset.validation.bytes == sum(len(reply.encode()) for reply in replies)


def test_of_a_pair_the_last_replies_alone_are_trained(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    context = [*conversation(1)["messages"], {"role": "user", "content": "And?"}]
    rows = [{"prompt": context, "chosen": f"Yes {n}", "rejected": f"No {n}"} for n in range(40)]
    dataset = prepared(tmp_path, rows, "preferences", tiny_tokenizer)
    assert dataset.report.train.kept * 2 == dataset.train.documents
    found = documents(dataset.train)
    for pair in (found[0:2], found[2:4]):
        texts = [
            tiny_tokenizer.decode([i for i, own in zip(*each, strict=True) if own], specials=True) for each in pair
        ]
        assert re.fullmatch(r"Yes \d+<end_of_turn>No (\d+)<end_of_turn>", "".join(texts))
        assert texts[0].replace("Yes", "No") == texts[1]
    check_loss_mask(dataset.train, tiny_tokenizer, "train")


def test_prompts_end_where_the_model_begins_and_keep_their_rows(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"Add {n}", "answer": f"{n}"} for n in range(40)]
    dataset = prepared(tmp_path, rows, "prompts", tiny_tokenizer)
    for (ids, mask), row in zip(documents(dataset.train), read_prompts(dataset.train), strict=True):
        assert ids == render_chat(tiny_tokenizer, row["messages"], reply=True).ids
        assert not any(mask)
        assert row["messages"][0]["content"] == f"Add {row['task']['answer']}"
    next((tmp_path / "data").glob("*.jsonl")).write_text("{}\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="has 1 rows for"):
        read_prompts(dataset.validation), read_prompts(dataset.train)


def test_line_separators_within_prompts_separate_no_rows(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"One\u2028two\u2029three\x85four {n}"} for n in range(40)]
    dataset = prepared(tmp_path, rows, "prompts", tiny_tokenizer)
    found = [
        row["messages"][0]["content"] for corpus in (dataset.train, dataset.validation) for row in read_prompts(corpus)
    ]
    assert sorted(found) == sorted(row["prompt"] for row in rows)


def test_segments_are_read_from_the_tokens(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    dataset = prepared(tmp_path, [conversation(3 * n) for n in range(40)], "conversations", tiny_tokenizer)
    found = list(segments(dataset.train, 0, tiny_tokenizer))
    assert [(s.role, s.trained) for s in found] == [
        *[("template", False), ("user", False), ("template", False), ("model", True)] * 2, ("template", False)
    ]  # fmt: skip
    assert sum(len(s.ids) for s in found) == dataset.train.lengths[0]
    assert tiny_tokenizer.decode(found[3].ids, specials=True).startswith("Reply ")


def test_roles_end_with_their_document(tiny_tokenizer: Tokenizer) -> None:
    prompt = render_chat(tiny_tokenizer, [{"role": "user", "content": "Hm"}], reply=True).ids
    roles = token_roles(np.array([*prompt, *prompt], np.uint16), tiny_tokenizer)
    assert roles.tolist()[: len(prompt)] == roles.tolist()[len(prompt) :]
    assert ROLES[int(roles.max())] == "user"


def masked_corpus(folder: Path, ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Corpus:
    writer = ShardWriter(folder / "train.tokens", tokenizer.fingerprint, tokenizer.vocab_size, masked=True)
    good = render_chat(tokenizer, conversation(0)["messages"])
    writer.append(good.ids, 1, good.trained)
    writer.append(ids, 1, trained)
    writer.finalize()
    return open_corpus(folder, ["train.tokens"], tokenizer.fingerprint)


def test_masks_that_teach_nothing_or_no_end_are_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    ids, trained = render_chat(tiny_tokenizer, conversation(0)["messages"])
    last = max(place for place, own in enumerate(trained) if own)
    cases = {
        "document 1 has no token to train on": (ids, [False] * len(ids)),
        "document 1 has a reply that does not end with <end_of_turn>": (ids[:last], trained[:last]),
        "document 1 has bos in its midst": ([ids[0], *ids], [False, *trained]),
    }
    for number, (words, (own, mask)) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        corpus = masked_corpus(tmp_path / str(number), own, mask, tiny_tokenizer)
        with pytest.raises(DatasetError, match=words):
            check_loss_mask(corpus, tiny_tokenizer, "train")
    with pytest.raises(DatasetError, match="has no loss mask, so it is text"):
        check_loss_mask(write_corpus(tmp_path, [[1, 2]]), tiny_tokenizer, "train")


def test_a_tokenizer_that_is_missing_or_without_turns_is_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps(conversation(0)))
    settings = DataSettings(train=(str(source),), kind="conversations")
    with pytest.raises(RecipeError, match=r"data\.kind = .* needs a tokenizer that exists: set train\.start"):
        prepare_dataset(settings, TokenizerSettings(), tmp_path / "out")
    without = Tokenizer(tiny_tokenizer._document.replace("<end_of_turn>", "<other>"), {})
    with pytest.raises(TokenizerError, match="the tokenizer has no <end_of_turn>"):
        prepare_dataset(settings, without, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_datasets_of_text_are_written_as_before(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [{"text": f"story number {n}"} for n in range(40)]
    prepared(tmp_path, rows, "text", tiny_tokenizer)
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert not {"kind", "too_long"} & manifest["settings"].keys()
    assert "loss_mask" not in (tmp_path / "data" / "report.json").read_text()
    assert all(file.read_bytes()[8] == 1 for file in (tmp_path / "data").glob("*.tokens"))
