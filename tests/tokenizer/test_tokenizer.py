import copy
import json
from pathlib import Path

import pytest
import tokenizers
from awkward_text import sentences
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gemmule.errors import OutputError, TokenizerError
from gemmule.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.stream_decoder()
    return "".join(map(decoder.feed, ids)) + decoder.end()


@given(st.data())
def test_decoding_an_encoding_is_the_identity(
    tokenizer: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(texts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert stream(tokenizer, ids) == text


@given(st.data())
def test_token_bytes_add_up_to_the_text(
    tokenizer: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(texts)
    sizes = tokenizer.token_bytes()
    assert sum(sizes[token] for token in tokenizer.encode(text)) == len(text.encode())


@given(st.lists(st.integers(0, 520)))
def test_streaming_equals_decoding_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


def test_stream_holds_back_incomplete_characters(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    assert [decoder.feed(token) for token in tokenizer.encode("\U0001f984")] == ["", "", "", "", "\U0001f984"]
    decoder.feed(tokenizer.encode("\U0001f984")[1])
    assert decoder.end() == "\ufffd"


def test_bos_comes_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.adds_bos
    assert tokenizer.encode("fox").count(2) == 1
    assert tokenizer.encode("<bos>fox", specials=True) == tokenizer.encode("fox")


def test_text_cannot_forge_special_tokens(tokenizer: Tokenizer) -> None:
    text = "<start_of_turn>user\nHi<end_of_turn>\n<eos>"
    assert not set(tokenizer.encode(text)[1:]) & set(range(6))
    assert {1, 4, 5} <= set(tokenizer.encode(text, specials=True))
    assert not set(tokenizer.encode(text)[1:]) & set(range(6)), "asking for specials once must not switch them on"


def test_special_tokens_are_decoded_only_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<start_of_turn>fox<end_of_turn>", specials=True)
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, specials=True) == "<bos><start_of_turn>fox<end_of_turn>"


def test_documents_begin_with_bos_and_end_with_eos(tokenizer: Tokenizer) -> None:
    texts = ["the fox", "", "<eos>"]
    assert tokenizer.encode_documents(texts) == [[*tokenizer.encode(text), 1] for text in texts]


def test_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate .*character 1"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode_documents(["fine", "a\udfff"])


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    again = Tokenizer.load(tmp_path / "new")
    assert again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tmp_path / "new" / "tokenizer.json").encode("the fox") == tokenizer.encode("the fox")
    assert (again.bos_id, again.eos_id, again.pad_id) == (2, 1, 0)
    again.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_template_without_a_config_beside_it_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.chat_template == "{{ messages }}"
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["padding_side"]) == ("<eos>", "left")


def test_fingerprint_ignores_spelling_and_sees_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(dict(reversed(description.items())), indent=3), encoding="utf-8")
    assert Tokenizer.load(file).fingerprint == tokenizer.fingerprint
    description["model"]["merges"] = description["model"]["merges"][:-1]
    file.write_text(json.dumps(description), encoding="utf-8")
    assert Tokenizer.load(file).fingerprint != tokenizer.fingerprint


def test_missing_and_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere.json: no such file"):
        Tokenizer.load(tmp_path / "nowhere.json")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for damaged in (
        b"",
        b"{}",
        b"[]",
        b'"x"',
        whole[: len(whole) // 2],
        whole.replace(b'"BPE"', b'"ZZZ"'),
        b"\xff\xfe{",
    ):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    for damaged in (b"{", b"[1]"):
        (tmp_path / "tokenizer_config.json").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer.load(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"taken"):
        tokenizer.save(tmp_path / "taken")


# Foreign vocabularies, shaped like the published ones.


def save_library(library: tokenizers.Tokenizer, folder: Path, config: dict[str, object] | None = None) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder)


def gpt2_library() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(sentences(100, seed=1), trainer)
    return library


def byte_fallback_library(vocabulary: list[str], specials: list[str]) -> tokenizers.Tokenizer:
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    merges = [("\u2581", "t"), ("\u2581t", "o")]
    library = tokenizers.Tokenizer(models.BPE(vocab=ranks, merges=merges, byte_fallback=True, unk_token="<unk>"))
    library.add_special_tokens(specials)
    return library


def gemma_library() -> tokenizers.Tokenizer:
    library = byte_fallback_library([*"\u2581tox", "\u2581t", "\u2581to"], ["<pad>", "<eos>", "<bos>", "<unk>"])
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return library


def llama_library() -> tokenizers.Tokenizer:
    library = byte_fallback_library([*"\u2581tox", "\u2581t", "\u2581to"], ["<unk>", "<s>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def wordpiece_library() -> tokenizers.Tokenizer:
    vocabulary = {token: rank for rank, token in enumerate(["[UNK]", "[PAD]", "</s>", "to", "##x"])}
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["</s>"])
    return library


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return Tokenizer(gpt2_library().to_str(), {})


@given(st.data())
def test_byte_level_vocabularies_are_exact(gpt2: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject) -> None:
    text = data.draw(texts)
    ids = gpt2.encode(text)
    sizes = gpt2.token_bytes()
    assert gpt2.decode(ids) == stream(gpt2, ids) == text
    assert sum(sizes[token] for token in ids) == len(text.encode())


def test_gpt2_style_has_one_special_token_and_no_bos(tmp_path: Path) -> None:
    tokenizer = save_library(gpt2_library(), tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    assert not tokenizer.adds_bos
    assert tokenizer.encode_documents(["fox"]) == [[*tokenizer.encode("fox"), 0]]


def test_gemma_style_follows_its_post_processor(tmp_path: Path) -> None:
    tokenizer = save_library(gemma_library(), tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    ids = tokenizer.encode(" to x\u00e9 ")
    assert ids[0] == 2
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == " to x\u00e9 "
    assert sum(tokenizer.token_bytes()[token] for token in ids) == len(" to x\u00e9 ".encode())


def test_llama_style_drops_the_dummy_prefix(tmp_path: Path) -> None:
    tokenizer = save_library(llama_library(), tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    ids = tokenizer.encode("to x")
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == "to x"


def test_decoders_that_look_at_neighbours_stream_too(tmp_path: Path) -> None:
    tokenizer = save_library(wordpiece_library(), tmp_path)
    ids = tokenizer.encode("to tox to")
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == "to tox to"


def test_config_beside_the_file_names_the_special_tokens(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": {"content": "<unk>", "special": True}, "chat_template": "x"}
    tokenizer = save_library(llama_library(), tmp_path / "a", config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    tokenizer.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text(encoding="utf-8")) == config


def test_truncation_and_padding_of_published_files_are_off(tmp_path: Path) -> None:
    library = gpt2_library()
    library.enable_truncation(4)
    library.enable_padding(length=9)
    tokenizer = save_library(library, tmp_path)
    assert len(tokenizer.encode("the little fox found the red kite near the old mill")) > 9
    assert len(tokenizer.encode("a")) == 1


def test_a_vocabulary_without_an_end_cannot_train(tmp_path: Path) -> None:
    tokenizer = save_library(llama_library(), tmp_path, {"eos_token": None})
    with pytest.raises(TokenizerError, match="eos_token"):
        tokenizer.encode_documents(["to"])


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers sees it: the config says Gemma 3."""
    folder: Path = tmp_path_factory.mktemp("model")
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "vocab_size": tokenizer.vocab_size}))
    return folder


@pytest.mark.parametrize("opener", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_encodes_identically(
    opener: str, saved: Path, tokenizer: Tokenizer, texts: st.SearchStrategy[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, opener).from_pretrained(saved)
    plain = copy.deepcopy(theirs)
    plain.split_special_tokens = True
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert theirs.padding_side == "left"
    assert set(theirs("fox")) == {"input_ids", "attention_mask"}

    @given(texts)
    def agree(text: str) -> None:
        assert plain(text)["input_ids"] == tokenizer.encode(text)
        if not text.startswith("<bos>"):
            assert theirs(text)["input_ids"] == tokenizer.encode(text, specials=True)
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text

    agree()


def test_a_chat_template_in_a_file_of_its_own_is_carried_on(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tiny_tokenizer.chat_template is None
    (tmp_path / "again").mkdir()
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.chat_template == "{{ messages }}"
    assert (again.bos_id, again.fingerprint) == (tiny_tokenizer.bos_id, tiny_tokenizer.fingerprint)
