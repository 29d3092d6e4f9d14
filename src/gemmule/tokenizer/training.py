"""Train a BPE vocabulary with byte fallback, in Gemma's conventions."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gemmule.errors import TokenizerError
from gemmule.tokenizer.pieces import WORD_MARK
from gemmule.tokenizer.settings import BYTES, FIRST_PIECE, SPECIALS
from gemmule.tokenizer.tokenizer import Tokenizer

# Pre-tokenization: runs of one character class, with spaces joined to the next word or punctuation, and single digits.
# A boundary depends only on the two adjacent characters, so no piece contains one, and llama.cpp, which knows only the
# vocabulary, encodes identically without this pattern.
BOUNDARIES = r" *[\p{L}\p{M}]+| *[^\s\p{L}\p{M}\p{N}]+|\p{N}|\n+|\t+| +|[^\S\n\t ]+"

_LONGEST_PIECE = 32  # characters; excludes rulers of dashes and base64 blobs from the vocabulary
# Training time is quadratic in the longest run of one class, so longer runs are split. Runs of ordinary text, in any
# script, are shorter, which leaves the vocabulary unchanged.
_LONGEST_RUN = 512  # characters
_LONG = re.compile(rf"[^\s\d]{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}")  # candidates for such a run
_UNCOVERED = 1e-5  # share of the text whose rare characters are encoded by byte fallback
_FEWEST_CHARACTERS = 64  # minimum alphabet, where the text has as many


def train_tokenizer(documents: Iterable[str], vocab_size: int, *, at_most: bool = False) -> Tokenizer:
    """Train a vocabulary of exactly `vocab_size` ids; `documents` are kept in memory.

    With `at_most`, it is as large as the documents allow where they are too few. TokenizerError names valid sizes.
    """
    documents = list(documents)
    vocabulary = _train(documents, vocab_size)
    while at_most and len(vocabulary) < vocab_size:
        vocab_size = len(vocabulary)
        vocabulary = _train(documents, vocab_size)  # so that the smaller size, given as such, leads to the same
    if len(vocabulary) < vocab_size:
        raise TokenizerError(
            f"tokenizer.vocab_size = {vocab_size}: more than this corpus allows; "
            f"use {len(vocabulary)} or less, or more text"
        )
    return _build(vocabulary)


def _train(documents: Sequence[str], vocab_size: int) -> list[str]:
    """Return the tokens in id order, `vocab_size` of them or as many as there are."""
    alphabet = _choose_alphabet(documents, vocab_size)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(BOUNDARIES), behavior="isolated")
    if any(map(_LONG.search, documents)):
        cut = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{{_LONGEST_RUN}}}"), behavior="isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([library.pre_tokenizer, cut])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIALS, *BYTES],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=_LONGEST_PIECE,
        show_progress=False,
    )
    library.train_from_iterator(_without_rare_characters(documents, alphabet), trainer)
    vocabulary = library.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _choose_alphabet(documents: Sequence[str], vocab_size: int) -> list[str]:
    """Return the alphabet: the most frequent characters, at most half of the vocabulary."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    # Without U+2581, which GGUF uses for spaces.
    del counts[WORD_MARK]
    if not counts:
        raise TokenizerError(f"tokenizer.vocab_size = {vocab_size}: there is no text to train a vocabulary on")
    alphabet, covered = [], 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered > (1 - _UNCOVERED) * counts.total():
            break
        alphabet.append(character)
        covered += count
    needed = FIRST_PIECE + min(len(alphabet), _FEWEST_CHARACTERS)
    if vocab_size < needed:
        raise TokenizerError(
            f"tokenizer.vocab_size = {vocab_size}: too small for {len(SPECIALS)} special tokens, {len(BYTES)} bytes "
            f"and the {needed - FIRST_PIECE} most frequent characters; use {needed} or more"
        )
    return alphabet[: max(_FEWEST_CHARACTERS, (vocab_size - FIRST_PIECE) // 2)]


def _without_rare_characters(documents: Iterable[str], alphabet: Sequence[str]) -> Iterator[str]:
    # The trainer would drop them and join their neighbors, which a digit keeps apart. The digit itself is not added to
    # the alphabet.
    rare = re.compile(f"[^{re.escape(''.join(alphabet))}]")
    return (rare.sub("0", document) for document in documents)


def _build(vocabulary: Sequence[str]) -> Tokenizer:
    """Build the tokenizer from its tokens in id order."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=ranks, merges=_every_merge(vocabulary[FIRST_PIECE:]), unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    # Spaces are kept. Google replaces them by U+2581, which decodes a U+2581 of the text to a space.
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(BOUNDARIES), behavior="isolated")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", ranks["<bos>"])]
    )
    return Tokenizer(library.to_str(), {})


def _every_merge(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of pieces that concatenates to a piece, ordered by the rank of the result.

    This is SentencePiece's rule (any adjacent pieces whose concatenation is a piece, best first), as in llama.cpp.
    """
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
