import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from awkward_text import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmule.errors import TokenizerError
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE, END, START, render_chat
from gemmule.tokenizer.pieces import WORD_MARK
from gemmule.tokenizer.settings import BYTES, FIRST_PIECE
from gemmule.tokenizer.training import train_tokenizer
from gemmule.tokenizer.trim import check_trimmable, choose_ids, compare_encodings, count_ids, trim_tokenizer

CORPUS = sentences(30, seed=5)
OTHERS = sentences(200, seed=6)


def google_like(own: Tokenizer) -> Tokenizer:
    """Return a trained vocabulary in Google's layout, with what only Google's has."""
    pieces = [own.decode([token]).replace(" ", WORD_MARK) for token in range(FIRST_PIECE, own.vocab_size)]
    added = ["\n", "\n\n", "\n\n\n", "  ", "<table>"]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    unused = [f"<unused{number}>" for number in range(9)]
    tokens = [*specials, "[multimodal]", *unused[:6], START, END, *added, *BYTES]
    tokens += [piece for piece in pieces if piece not in added]
    tokens += ["<start_of_image>", "<end_of_image>", *unused[6:]]
    ids = {token: number for number, token in enumerate(tokens)}
    user_defined = {"[multimodal]", *added, "<table>"}
    images = {"<start_of_image>", "<end_of_image>"}
    merges = [[part.replace(" ", WORD_MARK) for part in pair] for pair in own.description["model"]["merges"]]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": {"max_length": 9, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, **flags, "special": token not in user_defined}
            for token in [*specials, *user_defined, *unused, START, END, *images]
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, first],
                    "pair": [first, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
                },
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": WORD_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": ids, "merges": merges,
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "GemmaTokenizerFast",
        "processor_class": "Gemma3Processor",
        "added_tokens_decoder": {
            str(token["id"]): {name: token[name] for name in ("content", *flags, "special")}
            for token in description["added_tokens"]
        },
        "boi_token": "<start_of_image>",
        "extra_special_tokens": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "additional_special_tokens": [START, {"content": "<end_of_image>"}],
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
        "chat_template": CHAT_TEMPLATE + "{# <start_of_image> #}",
    }
    return Tokenizer(json.dumps(description), config)


@pytest.fixture(scope="module", params=["ours", "like Google's"])
def whole(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "ours" else google_like(tokenizer)


def trimmed_to(
    whole: Tokenizer, corpus: Sequence[str], size: int | None = None, min_count: int = 1
) -> tuple[Tokenizer, list[int]]:
    kept = choose_ids(whole, count_ids(whole, corpus), size, min_count)
    return trim_tokenizer(whole, kept), kept


def old(kept: Sequence[int], ids: Sequence[int]) -> list[int]:
    return [kept[token] for token in ids]


def content(tokenizer: Tokenizer, token: int) -> str:
    pieces: dict[str, int] = tokenizer.description["model"]["vocab"]
    return next(piece for piece, number in pieces.items() if number == token)


@settings(max_examples=60)
@given(st.data())
def test_any_corpus_is_encoded_and_decoded_as_before(
    whole: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    corpus = data.draw(st.lists(texts | st.sampled_from(OTHERS), min_size=1, max_size=4))
    trimmed, kept = trimmed_to(whole, corpus)
    for text in corpus:
        before, after = whole.encode(text), trimmed.encode(text)
        assert old(kept, after) == before
        assert trimmed.decode(after) == whole.decode(before)
    # Text whose tokens are all kept is encoded as before, too, and any other is restored.
    compared = compare_encodings(whole, trimmed, kept, OTHERS[:20])
    assert compared.wrong == 0
    assert compared.trimmed_tokens >= compared.tokens
    assert [trimmed.decode(trimmed.encode(text)) for text in OTHERS[:20]] == OTHERS[:20]


def test_what_is_kept_is_the_corpus_its_closure_and_what_every_text_needs(tokenizer: Tokenizer) -> None:
    whole = google_like(tokenizer)
    _, kept = trimmed_to(whole, ["thank  you"])
    contents = [content(whole, token) for token in kept]
    expected = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", START, END, *BYTES, "\n", "  "}
    assert expected <= set(contents)
    rest = set(contents) - expected
    words = f"thank you user model {WORD_MARK}"
    assert {piece for piece in rest if piece not in words} == set()
    assert {*"thankyou"} <= rest, "the characters of which pieces are merged"
    assert "thank" in rest
    assert whole.encode("thank  you")[1] == kept[contents.index("thank")]


def test_without_the_closure_the_corpus_would_change(tokenizer: Tokenizer) -> None:
    """The used ids alone, with bytes and characters, are not enough: pieces on the way are missing."""
    counts = count_ids(tokenizer, CORPUS)
    characters = {tokenizer.encode(character)[-1] for text in CORPUS for character in text}
    used = sorted({*range(FIRST_PIECE), *counts, *characters})
    assert compare_encodings(tokenizer, trim_tokenizer(tokenizer, used), used, CORPUS).wrong > 0


def test_merges_are_kept_in_order_wherever_their_pieces_are(whole: Tokenizer) -> None:
    trimmed, _ = trimmed_to(whole, CORPUS)
    model = trimmed.description["model"]
    merges = whole.description["model"]["merges"]
    assert model["merges"] == [pair for pair in merges if {*pair, "".join(pair)} <= model["vocab"].keys()]
    assert 0 < len(model["merges"]) < len(merges)
    assert list(model["vocab"].values()) == list(range(len(model["vocab"])))


def test_trimming_twice_changes_nothing(whole: Tokenizer) -> None:
    trimmed, _ = trimmed_to(whole, CORPUS)
    again, kept = trimmed_to(trimmed, CORPUS)
    assert kept == list(range(trimmed.vocab_size))
    assert again.fingerprint == trimmed.fingerprint


def test_size_is_met_exactly_and_adds_by_rank(whole: Tokenizer) -> None:
    _, kept = trimmed_to(whole, CORPUS[:2])
    with pytest.raises(
        TokenizerError, match=r"--size 99999: the vocabulary has \d+ ids, .*; use (\d+) or less"
    ) as caught:
        trimmed_to(whole, CORPUS[:2], size=99_999)
    most = int(str(caught.value).split("use ")[1].split()[0])
    assert len(kept) < most <= whole.vocab_size
    for size in {*range(len(kept), len(kept) + 20), *range(len(kept), most, 17), most}:
        trimmed, larger = trimmed_to(whole, CORPUS[:2], size)
        assert (trimmed.vocab_size, len(larger)) == (size, size)
        assert set(kept) <= set(larger)
        assert compare_encodings(whole, trimmed, larger, OTHERS).wrong == 0
        assert compare_encodings(whole, trimmed, larger, CORPUS[:2]).changed == 0
    # With all that stands for text, every text is encoded as before.
    full, everything = trimmed_to(whole, CORPUS[:2], most)
    assert compare_encodings(whole, full, everything, OTHERS).changed == 0
    left_out = {content(whole, token) for token in set(range(whole.vocab_size)) - set(everything)}
    assert all("unused" in token or "image" in token or token == "[multimodal]" for token in left_out)


def test_the_first_of_the_others_are_added(tokenizer: Tokenizer) -> None:
    _, kept = trimmed_to(tokenizer, CORPUS[:2])
    _, larger = trimmed_to(tokenizer, CORPUS[:2], len(kept) + 30)
    # Ours are numbered by rank, characters first, so that each is added with its parts present.
    others = [token for token in range(tokenizer.vocab_size) if token not in kept]
    assert sorted(set(larger) - set(kept)) == others[:30]


def test_size_below_what_is_needed_names_the_smallest(tokenizer: Tokenizer) -> None:
    _, kept = trimmed_to(tokenizer, CORPUS)
    with pytest.raises(TokenizerError, match=f"--size 263: the corpus needs {len(kept)} ids; use {len(kept)} or more"):
        trimmed_to(tokenizer, CORPUS, size=263)
    assert trimmed_to(tokenizer, CORPUS, len(kept))[1] == kept


def test_rare_ids_are_dropped_and_the_documents_with_them_change(whole: Tokenizer) -> None:
    counts = count_ids(whole, CORPUS)
    trimmed, kept = trimmed_to(whole, CORPUS, min_count=3)
    dropped = counts.keys() - set(kept)
    assert dropped
    assert all(counts[token] < 3 for token in dropped)
    compared = compare_encodings(whole, trimmed, kept, CORPUS)
    with_dropped = sum(not dropped.isdisjoint(ids) for ids in whole.encode_documents(CORPUS))
    assert (compared.documents, compared.changed, compared.wrong) == (len(CORPUS), with_dropped, 0)
    assert all(trimmed.decode(trimmed.encode(text)) == text for text in CORPUS)


def test_counts_and_comparison_are_those_of_one_document_at_a_time(tokenizer: Tokenizer) -> None:
    many = OTHERS + CORPUS
    assert count_ids(tokenizer, many) == sum(map(Counter, tokenizer.encode_documents(many)), Counter())
    trimmed, kept = trimmed_to(tokenizer, CORPUS)
    rows = [trimmed.encode_documents([text])[0] for text in many]
    compared = compare_encodings(tokenizer, trimmed, kept, many, positions=50)
    assert compared.trimmed_tokens == sum(map(len, rows))
    assert compared.tokens == sum(map(len, tokenizer.encode_documents(many)))
    assert compared.beginning == tuple([token for row in rows for token in row][:50])


def test_chats_follow(whole: Tokenizer) -> None:
    trimmed, kept = trimmed_to(whole, CORPUS[:3])
    assert trimmed.chat_template == whole.chat_template
    messages = [{"role": role, "content": text} for role, text in zip(("user", "model"), CORPUS[:2], strict=True)]
    before, after = render_chat(whole, messages), render_chat(trimmed, messages)
    assert old(kept, after.ids) == before.ids
    assert after.trained == before.trained


def test_special_tokens_get_their_new_ids_everywhere(tokenizer: Tokenizer) -> None:
    whole = google_like(tokenizer)
    trimmed, kept = trimmed_to(whole, CORPUS)
    for name in ("bos", "eos", "pad", "unk", "start_of_turn", "end_of_turn"):
        assert kept[getattr(trimmed, f"{name}_id")] == getattr(whole, f"{name}_id")
    assert whole.end_of_turn_id != trimmed.end_of_turn_id
    assert trimmed.adds_bos
    text = json.dumps(trimmed.description) + json.dumps({k: v for k, v in trimmed.config.items() if "chat" not in k})
    assert not any(word in text for word in ("unused", "image", "multimodal", "<table>", "Processor"))
    assert trimmed.config["added_tokens_decoder"].keys() == {str(t["id"]) for t in trimmed.description["added_tokens"]}
    assert trimmed.config["additional_special_tokens"] == [START]
    assert trimmed.config["mask_token"] == "<mask>"
    assert whole.description["added_tokens"][0]["id"] == 0, "the original is as it was"
    assert len(whole.description["model"]["vocab"]) == whole.vocab_size


def test_special_tokens_of_another_chat_template_are_kept(tokenizer: Tokenizer) -> None:
    whole = google_like(tokenizer)
    renamed = json.dumps(whole.description).replace("<unused3>", "<|im_start|>")
    config = {key: value for key, value in whole.config.items() if key != "added_tokens_decoder"}
    chatty = Tokenizer(renamed, config | {"chat_template": "<|im_start|><unused4>{{ messages }}"})
    trimmed, kept = trimmed_to(chatty, CORPUS)
    number = trimmed.encode("<|im_start|>", specials=True)[1]
    assert content(chatty, kept[number]) == "<|im_start|>"
    assert "<unused4>" not in trimmed.description["model"]["vocab"]


def test_what_the_corpus_has_is_kept_whatever_it_is(tokenizer: Tokenizer) -> None:
    whole = google_like(tokenizer)
    trimmed, kept = trimmed_to(whole, ["<table> [multimodal]"])
    assert {"<table>", "[multimodal]"} <= {content(whole, token) for token in kept}
    assert old(kept, trimmed.encode("<table>")) == whole.encode("<table>")


def test_tokens_of_a_pair_are_kept(tokenizer: Tokenizer) -> None:
    """What the post-processor names is kept, for otherwise the tokenizer could not be opened."""
    description = json.loads(json.dumps(tokenizer.description))
    token = FIRST_PIECE + 3
    name = content(tokenizer, token)
    description["post_processor"] = {"type": "RobertaProcessing", "sep": [name, token], "cls": ["<bos>", 2],
                                     "trim_offsets": True, "add_prefix_space": False}  # fmt: skip
    whole = Tokenizer(json.dumps(description), {})
    trimmed, kept = trimmed_to(whole, ["fox"])
    assert token in kept
    assert old(kept, trimmed.encode("fox")) == whole.encode("fox")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"byte_fallback": False}, "is byte-pair encoding without byte fallback"),
        ({"dropout": 0.1}, "has dropout"),
        ({"end_of_word_suffix": "</w>"}, "has end_of_word_suffix"),
        ({"vocab": None}, "is byte-pair encoding without byte fallback"),
        ({"type": "Unigram"}, "is Unigram"),
    ],
)
def test_other_tokenizers_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], found: str
) -> None:
    model = tokenizer.description["model"]
    if "vocab" in changes:
        changes = {"vocab": {piece: number for piece, number in model["vocab"].items() if piece != "<0x41>"}}
    check_trimmable(tokenizer)
    monkeypatch.setitem(tokenizer.description, "model", model | changes)
    with pytest.raises(TokenizerError, match=f"the model's tokenizer {found}; only byte-pair encoding with byte"):
        check_trimmable(tokenizer)


def test_merges_of_older_files_are_trimmed_too(tokenizer: Tokenizer) -> None:
    whole = google_like(tokenizer)
    description = json.loads(json.dumps(whole.description))
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    older, kept = trimmed_to(Tokenizer(json.dumps(description), whole.config), CORPUS)
    assert (older.encode(CORPUS[0]), kept) == (
        trimmed_to(whole, CORPUS)[0].encode(CORPUS[0]), trimmed_to(whole, CORPUS)[1],
    )  # fmt: skip


def test_spaces_stay_spaces_where_the_corpus_has_none(whole: Tokenizer) -> None:
    trimmed, _ = trimmed_to(whole, ["fox"])
    assert trimmed.decode(trimmed.encode("a  b c")) == "a  b c"


def test_transformers_opens_it_and_encodes_identically(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trimmed, _ = trimmed_to(google_like(tokenizer), CORPUS)
    trimmed.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "vocab_size": trimmed.vocab_size}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == trimmed.vocab_size, "no token was added"
    for text in CORPUS + OTHERS[:50]:
        assert theirs(text)["input_ids"] == trimmed.encode(text)
        assert theirs.decode(trimmed.encode(text), skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "thank you"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered == render_chat(trimmed, messages, reply=True).ids


def test_a_small_vocabulary_trained_on_the_corpus_is_kept_nearly_whole() -> None:
    small = train_tokenizer(CORPUS, 340)
    _, kept = trimmed_to(small, CORPUS)
    assert len(kept) >= 0.9 * small.vocab_size
