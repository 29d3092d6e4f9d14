"""A tokenizer: opened from any tokenizer.json, encoding by its own BOS policy, decoding exactly."""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from gemmule.errors import TokenizerError
from gemmule.files import written_aside
from gemmule.tokenizer.pieces import Pieces
from gemmule.tokenizer.streaming import PieceStream, RedecodingStream, TextStream

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# No vocabulary comes near it; lists that are as long as the largest id stay small.
LARGEST_ID = (1 << 22) - 1

# What a tokenizer.json without a tokenizer_config.json beside it is likely to call them, best known first.
_WELL_KNOWN = {
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "<|unk|>", "[UNK]"),
}


class Tokenizer:
    """Text to ids and back.

    Whether `bos` comes first is the policy stored in tokenizer.json (its post-processor); it is applied by `encode` and
    `encode_documents` and nowhere else. Ids that the vocabulary lacks are None.
    """

    def __init__(self, document: str, config: Mapping[str, Any]) -> None:
        """Take the text of a tokenizer.json and the contents of a tokenizer_config.json."""
        self._document = document
        self._config = dict(config)
        self._library = _open_library(document)
        self._library.encode_special_tokens = True
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.unk_id = self._special_id("unk_token")
        self.start_of_turn_id: int | None = self._library.token_to_id("<start_of_turn>")
        self.end_of_turn_id: int | None = self._library.token_to_id("<end_of_turn>")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Open a tokenizer.json or a folder with one; raises TokenizerError where it is missing or damaged."""
        file = path / TOKENIZER_FILE if path.is_dir() else path
        document = _read_text(file)
        config = _read_config(file.with_name(CONFIG_FILE))
        template = file.with_name(TEMPLATE_FILE)  # where newer folders have it; it is carried on in the config
        if config and template.exists():
            config["chat_template"] = _read_text(template)
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
        config = json.dumps(self._config or default, indent=2, ensure_ascii=False) + "\n"
        for name, text in ((TOKENIZER_FILE, self._document), (CONFIG_FILE, config)):
            with written_aside(folder / name) as aside:
                aside.write_text(text, encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256, in hex, of tokenizer.json with its spelling (spaces, order of keys) made canonical."""
        canonical = json.dumps(self.description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest, special tokens included."""
        count: int = self._library.get_vocab_size()
        if None not in map(self._library.id_to_token, range(count)):  # none is left out; to copy them all takes longer
            return count
        largest: int = max(self._library.get_vocab().values())
        if largest > LARGEST_ID:
            raise TokenizerError(f"tokenizer with an id of {largest}; the largest that is used is {LARGEST_ID}")
        return largest + 1

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the stored policy begins every text with bos."""
        return self.bos_id is not None and self._library.encode("").ids[:1] == [self.bos_id]

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a chat, where the tokenizer brings one."""
        template = self._config.get("chat_template")
        return template if isinstance(template, str) else None

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of `text`, after bos where the stored policy says so.

        Text that looks like a special token is ordinary text, unless `specials` is true (for templates, not for what
        a user typed); a bos written at the start of such text takes the place of the policy's.
        """
        library = self._with_specials if specials else self._library
        try:
            ids: list[int] = library.encode(text).ids
        except TypeError:
            raise _surrogates(text) from None
        return ids[1:] if specials and self.adds_bos and ids[:2] == [self.bos_id] * 2 else ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole documents as training sees them: by policy bos, then the text, then eos."""
        if self.eos_id is None:
            raise TokenizerError("the tokenizer has no end token; name its eos_token in tokenizer_config.json")
        try:
            rows = [encoding.ids for encoding in self._library.encode_batch_fast(texts)]
        except TypeError:
            raise _surrogates("".join(texts)) from None
        end = [self.eos_id]
        return [ids if ids[-1:] == end else ids + end for ids in rows]

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Return the text of `ids`; special tokens are left out unless `specials` is true."""
        if not self._pieces.concatenate:
            text: str = self._library.decode(list(ids), skip_special_tokens=not specials)
            return text
        written = self._pieces.specials if specials else {}
        text = b"".join(written.get(token) or self._piece(token) for token in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._pieces.drop_first_space else text

    def stream_decoder(self) -> TextStream:
        """Return a decoder for ids that arrive one by one; special tokens are left out."""
        if self._pieces.concatenate:
            return PieceStream(self._piece, drop_first_space=self._pieces.drop_first_space)
        return RedecodingStream(self.decode)

    def token_bytes(self) -> list[int]:
        """Return how many UTF-8 bytes of text each id stands for; special tokens stand for none.

        The sum over `encode(text)` is the length of the text in bytes, exactly, for byte-level and byte-fallback
        vocabularies that change nothing in the text (ours, Gemma's, GPT-2's).
        """
        return [len(self._piece(index)) for index in range(self.vocab_size)]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What tokenizer.json says, parsed."""
        description: dict[str, Any] = json.loads(self._document)
        return description

    @cached_property
    def _pieces(self) -> Pieces:
        try:
            return Pieces(self._decoding())
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise TokenizerError(f"tokenizer whose decoder is not understood ({error!r:.200})") from None

    def _decoding(self) -> dict[str, Any]:
        """Return the two parts of the description that decoding needs, without parsing a large vocabulary again."""
        decoder, added = self._library.decoder, self._library.get_added_tokens_decoder()
        return {
            "decoder": None if decoder is None else json.loads(decoder.__getstate__()),
            "added_tokens": [{"id": i, "content": t.content, "special": t.special} for i, t in added.items()],
        }

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        # A second instance, for flipping the switch of the first would not be safe among a server's threads.
        return _open_library(self._document)

    def _piece(self, token: int) -> bytes:
        text = self._library.id_to_token(token) if 0 <= token < self.vocab_size else None
        return b"" if text is None else self._pieces.text(text, token)

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
        library.no_truncation()  # many published files cut at 512 or pad
        library.no_padding()
        library.encode("")  # applies the post-processor, which may name tokens that are not there
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and when it panics not even an Exception
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-100:]}"
        raise TokenizerError(f"not a tokenizer.json ({shown})") from None
    return library


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(_read_text(file))
        json.dumps(config, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except RecursionError:
        raise TokenizerError(f"tokenizer {file}: nested too deeply; restore it or remove it") from None
    except ValueError as error:
        raise TokenizerError(f"tokenizer {file}: not valid JSON ({error}); restore it or remove it") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"tokenizer {file}: a JSON object is expected; restore it or remove it")
    return config


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise TokenizerError(f"tokenizer {file}: no such file") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"tokenizer {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise TokenizerError(f"tokenizer {file}: cannot be read: {error.strerror}") from error


def _surrogates(text: str) -> TokenizerError:
    place = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return TokenizerError(
        f"text has a lone surrogate ({text[place]!r} at character {place}), which UTF-8 cannot encode"
    )
