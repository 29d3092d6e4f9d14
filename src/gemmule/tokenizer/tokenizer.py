"""Tokenizer: loads any tokenizer.json, encodes with its BOS policy, decodes exactly."""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from gemmule.errors import TokenizerError
from gemmule.files import atomic_write
from gemmule.reading import IS_LFS_POINTER, is_lfs_pointer, path_kind
from gemmule.tokenizer.pieces import Pieces
from gemmule.tokenizer.streaming import PieceStream, RedecodingStream, TextStream

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# A limit against damaged files: lists are as long as the largest id.
LARGEST_ID = (1 << 22) - 1

# Special tokens assumed without a tokenizer_config.json, most common first.
_WELL_KNOWN = {
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "<|unk|>", "[UNK]"),
}


class Tokenizer:
    """Text to ids and back.

    The post-processor of tokenizer.json decides whether `encode` and `encode_documents` add `bos`. Missing special
    tokens have the id None.
    """

    def __init__(self, document: str, config: Mapping[str, Any]) -> None:
        """Take the text of a tokenizer.json and the contents of a tokenizer_config.json."""
        self._document = document
        self._config = dict(config)
        self._library = _open_library(document)
        self._library.encode_special_tokens = True
        self._known_pieces: dict[int, bytes] = {}  # of the tokens that occurred
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.unk_id = self._special_id("unk_token")
        self.start_of_turn_id: int | None = self._library.token_to_id("<start_of_turn>")
        self.end_of_turn_id: int | None = self._library.token_to_id("<end_of_turn>")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer.json or a folder with one; TokenizerError where it is missing or damaged."""
        file = path / TOKENIZER_FILE if path_kind(path, TokenizerError) == "folder" else path
        document = _read_text(file)
        if document is None:
            raise TokenizerError(f"tokenizer {file}: no such file")
        config = _read_config(file.with_name(CONFIG_FILE))
        template = _read_text(file.with_name(TEMPLATE_FILE))  # where newer folders have it; kept in the config
        if template is not None:
            config["chat_template"] = template
        try:
            return cls(document, config)
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer {file}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json so that transformers opens them and encodes identically."""
        names = {name: token for name in _WELL_KNOWN if (token := self._token_of(name)) is not None}
        # With this class transformers reads tokenizer.json as it is; by the model type alone (gemma3_text) it would
        # rebuild a GemmaTokenizer with Google's normalizer around our vocabulary.
        default = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",  # so that every row of a batch ends where generation goes on
            **names,
        }
        settings = self._config if self._config.keys() - {"chat_template"} else default | self._config
        config = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        for name, text in ((TOKENIZER_FILE, self._document), (CONFIG_FILE, config)):
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the canonical tokenizer.json, independent of whitespace and key order."""
        canonical = json.dumps(self.description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the largest id plus one."""
        count: int = self._library.get_vocab_size()
        if None not in map(
            self._library.id_to_token, range(count)
        ):  # without gaps; copying the vocabulary takes longer
            return count
        largest: int = max(self._library.get_vocab().values())
        if largest > LARGEST_ID:
            raise TokenizerError(f"tokenizer with an id of {largest}; the largest that is used is {LARGEST_ID}")
        return largest + 1

    @cached_property
    def adds_bos(self) -> bool:
        """Whether encoding adds bos."""
        return self.bos_id is not None and self._library.encode("").ids[:1] == [self.bos_id]

    @property
    def config(self) -> Mapping[str, Any]:
        """The contents of tokenizer_config.json, with the chat template."""
        return self._config

    @property
    def chat_template(self) -> str | None:
        """The default chat template (Jinja), or None."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """All chat templates (Jinja) by name; "default" is the usual one."""
        given = self._config.get("chat_template")
        if isinstance(given, str):
            return {"default": given}
        entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
        named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry.get("name"), str)}
        return {str(name): text for name, text in named.items() if isinstance(text, str)}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: end of document, and end of turn where there is one."""
        return tuple(i for i in (self.eos_id, self.end_of_turn_id) if i is not None)

    def with_chat_template(self, template: str) -> "Tokenizer":
        """Return the same tokenizer with another chat template (Jinja)."""
        return Tokenizer(self._document, {**self._config, "chat_template": template})

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Encode a text, with bos where the tokenizer adds it.

        Special tokens in the text are encoded as ordinary text, unless `specials` is true (for templates, not for user
        input); then a bos at the start of the text is not doubled.
        """
        library = self._with_specials if specials else self._library
        try:
            ids: list[int] = library.encode(text).ids
        except TypeError:
            raise _surrogates(text) from None
        return ids[1:] if specials and self.adds_bos and ids[:2] == [self.bos_id] * 2 else ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode documents for training: bos where the tokenizer adds it, the text, eos."""
        if self.eos_id is None:
            raise TokenizerError("the tokenizer has no end token; name its eos_token in tokenizer_config.json")
        try:
            rows = [encoding.ids for encoding in self._library.encode_batch_fast(texts)]
        except TypeError:
            raise _surrogates("".join(texts)) from None
        end = [self.eos_id]
        return [ids if ids[-1:] == end else ids + end for ids in rows]

    def restores(self, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each text whether decoding its ids restores it exactly."""
        decoded = self.decode_batch(rows)
        return [own == text or self.decode(row) == text for own, row, text in zip(decoded, rows, texts, strict=True)]

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Decode ids; special tokens are skipped unless `specials` is true."""
        if not self.concatenates:
            text: str = self._library.decode(list(ids), skip_special_tokens=not specials)
            return text
        written = self._pieces.specials if specials else {}
        text = b"".join(written.get(token) or self.piece(token) for token in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._pieces.drop_first_space else text

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Decode several rows of ids at once, on all cores; special tokens are skipped."""
        texts: list[str] = self._library.decode_batch([list(row) for row in rows], skip_special_tokens=True)
        return texts

    def stream_decoder(self) -> TextStream:
        """Return a streaming decoder; special tokens are skipped."""
        if self.concatenates:
            return PieceStream(self.piece, drop_first_space=self._pieces.drop_first_space)
        return RedecodingStream(self.decode)

    def token_bytes(self) -> list[int]:
        """Return the number of UTF-8 bytes of each id; special tokens have none.

        Their sum over `encode(text)` is the length of the text in bytes, for byte-level and byte-fallback vocabularies
        without normalization (ours, Gemma's, GPT-2's).
        """
        return [len(self._read_piece(index)) for index in range(self.vocab_size)]

    def piece(self, token: int) -> bytes:
        """Return the bytes that an id stands for within a text; special tokens and unknown ids have none."""
        if token not in self._known_pieces and 0 <= token < self.vocab_size:
            self._known_pieces[token] = self._read_piece(token)
        return self._known_pieces.get(token, b"")

    def _read_piece(self, token: int) -> bytes:
        text = self._library.id_to_token(token)
        return b"" if text is None else self._pieces.text(text, token)

    @property
    def concatenates(self) -> bool:
        """Whether decoding concatenates the pieces of the ids; not so where a token's text depends on its neighbors."""
        return self._pieces.concatenate

    @property
    def special_tokens(self) -> dict[int, str]:
        """The names of the special tokens by id."""
        return {index: name.decode() for index, name in self._pieces.specials.items()}

    @cached_property
    def description(self) -> dict[str, Any]:
        """The parsed tokenizer.json."""
        description: dict[str, Any] = json.loads(self._document)
        return description

    @cached_property
    def _pieces(self) -> Pieces:
        try:
            return Pieces(self._decoding())
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise TokenizerError(f"tokenizer whose decoder is not understood ({error!r:.200})") from None

    def _decoding(self) -> dict[str, Any]:
        """Return decoder and added tokens, without parsing a large vocabulary again."""
        decoder, added = self._library.decoder, self._library.get_added_tokens_decoder()
        return {
            "decoder": None if decoder is None else json.loads(decoder.__getstate__()),
            "added_tokens": [{"id": i, "content": t.content, "special": t.special} for i, t in added.items()],
        }

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        # A second instance, because changing the option of the first is not thread-safe.
        return _open_library(self._document)

    def _special_id(self, name: str) -> int | None:
        token = self._token_of(name)
        return None if token is None else self._library.token_to_id(token)

    def _token_of(self, name: str) -> str | None:
        if name in self._config:
            entry = self._config[name]
            token = entry.get("content") if isinstance(entry, dict) else entry
            if entry is not None and not isinstance(token, str):
                raise TokenizerError(f"{CONFIG_FILE}: {name} is {reprlib.repr(entry)}, not a token")
            return token
        return next((token for token in _WELL_KNOWN[name] if self._library.token_to_id(token) is not None), None)


def _open_library(document: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(document)
        library.no_truncation()  # many published files truncate to 512 or pad
        library.no_padding()
        library.encode("")  # applies the post-processor, which may name tokens that are not there
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and a panic is not an Exception
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-100:]}"
        raise TokenizerError(f"not a tokenizer.json ({shown})") from None
    return library


def _read_config(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    if text is None:
        return {}
    try:
        config = json.loads(text)
        json.dumps(config, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except RecursionError:
        raise TokenizerError(f"tokenizer {file}: nested too deeply; restore it or remove it") from None
    except ValueError as error:
        raise TokenizerError(f"tokenizer {file}: not valid JSON ({error}); restore it or remove it") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"tokenizer {file}: a JSON object is expected; restore it or remove it")
    return config


def _read_text(file: Path) -> str | None:
    """Return the text of a file, None where there is no such file."""
    try:
        content = file.read_bytes()
        if is_lfs_pointer(content):
            raise TokenizerError(f"tokenizer {file}: {IS_LFS_POINTER}")
        return content.decode("utf-8-sig")  # editors of some systems put a byte order mark first
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"tokenizer {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise TokenizerError(f"tokenizer {file}: cannot be read: {error.strerror}") from error


def _surrogates(text: str) -> TokenizerError:
    position = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return TokenizerError(
        f"text has a lone surrogate ({text[position]!r} at character {position}), which UTF-8 cannot encode"
    )
