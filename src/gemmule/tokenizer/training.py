"""A byte-fallback BPE vocabulary from any text, in Gemma's conventions."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gemmule.errors import TokenizerError
from gemmule.tokenizer.pieces import WORD_MARK
from gemmule.tokenizer.settings import BYTES, FIRST_PIECE, SPECIALS
from gemmule.tokenizer.tokenizer import Tokenizer

# Runs of one class, with spaces joined to the word or punctuation after them and digits alone. Whether there is a
# boundary depends on the two adjacent characters alone, so no piece holds one, and a tokenizer that knows only the
# vocabulary (llama.cpp's) makes the same tokens without this pattern.
BOUNDARIES = r" *[\p{L}\p{M}]+| *[^\s\p{L}\p{M}\p{N}]+|\p{N}|\n+|\t+| +|[^\S\n\t ]+"

_LONGEST_PIECE = 32  # characters; keeps a ruler of dashes or a base64 blob out of the vocabulary
_UNCOVERED = 1e-5  # the share of the text whose rare characters may be spelt in bytes, of which they cost a few
_FEWEST_CHARACTERS = 64  # what a vocabulary must have room for, where the text has that many


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a vocabulary of exactly `vocab_size` ids; `documents` are held in memory.

    Raises TokenizerError that names the sizes which would work.
    """
    documents = list(documents)
    alphabet = _choose_alphabet(documents, vocab_size)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(BOUNDARIES), behavior="isolated")
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
    if len(vocabulary) < vocab_size:
        raise TokenizerError(
            f"tokenizer.vocab_size = {vocab_size}: more than this corpus allows; "
            f"use {len(vocabulary)} or less, or more text"
        )
    return _build(sorted(vocabulary, key=vocabulary.__getitem__))


def _choose_alphabet(documents: Sequence[str], vocab_size: int) -> list[str]:
    """Return the most frequent characters, all that matter and fit beside at least as many merged pieces."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    # The word mark stays out: exports to formats that write spaces with it must not confuse the two.
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
    # The trainer would drop them and join their neighbours; a digit keeps these apart. It is left out of the pieces
    # itself where it is not in the alphabet.
    rare = re.compile(f"[^{re.escape(''.join(alphabet))}]")
    return (rare.sub("0", document) for document in documents)


def _build(vocabulary: Sequence[str]) -> Tokenizer:
    """Return the tokenizer of the given tokens, in the order of their ids."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=ranks, merges=_every_merge(vocabulary[FIRST_PIECE:]), unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    # Spaces are kept as they are. Google writes them as U+2581, which turns a U+2581 of the text into a space.
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(BOUNDARIES), behavior="isolated")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", ranks["<bos>"])]
    )
    return Tokenizer(library.to_str(), {})


def _every_merge(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, by the rank of what it makes.

    That is SentencePiece's rule (any neighbours whose union is known, best first), which llama.cpp follows.
    """
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
