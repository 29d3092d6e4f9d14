"""Document filters: length, regular expressions, and language-independent quality heuristics."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice

from gemmule.data.settings import DataSettings

# Letters of scripts without spaces between words (Thai to Khmer, Chinese, Japanese); each counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SPACED_WORD = re.compile(rf"[^\s{_UNSPACED}]+")
_SYMBOL = re.compile(r"[#{}<>|\\^~=*_@$\u2026]|\.\.\.")

_PHRASE = 5  # words: n-grams
_FEWEST_LETTERS = 0.5  # share of the non-space characters
_SHORTEST_WORD, _LONGEST_WORD = 1.5, 15.0  # characters: mean word length
_MOST_SYMBOLS = 0.2  # per word
_MOST_REPEATED = 0.3  # share of the lines; of the n-grams


def reason_to_drop(text: str, settings: DataSettings) -> str | None:
    """Return the name of the first filter that drops a text, or None."""
    for name, drops in FILTERS.items():
        if drops(text, settings):
            return name
    if settings.quality:
        return next((name for name, fails in QUALITY.items() if fails(text)), None)
    return None


def _too_short(text: str, settings: DataSettings) -> bool:
    return len(text) < settings.min_characters


def _too_long(text: str, settings: DataSettings) -> bool:
    return settings.max_characters is not None and len(text) > settings.max_characters


def _unwanted(text: str, settings: DataSettings) -> bool:
    drop, keep = settings.drop_matching, settings.keep_matching
    dropped = drop is not None and re.search(drop, text) is not None
    return dropped or (keep is not None and re.search(keep, text) is None)


FILTERS: dict[str, Callable[[str, DataSettings], bool]] = {
    "too_short": _too_short,
    "too_long": _too_long,
    "unwanted": _unwanted,
}


def _few_letters(text: str) -> bool:
    """Tables, numbers, markup: less than half of the non-space characters are letters."""
    return sum(map(str.isalpha, text)) < _FEWEST_LETTERS * len("".join(text.split()))


def _odd_words(text: str) -> bool:
    """Spaced letters, keys or base64: a mean word length below 1.5 or above 15 characters."""
    words = _SPACED_WORD.findall(text)
    mean = sum(map(len, words)) / max(1, len(words))
    return 2 * len(words) > len(_WORD.findall(text)) and not _SHORTEST_WORD <= mean <= _LONGEST_WORD


def _many_symbols(text: str) -> bool:
    """Code, markup, lists of hashtags: more than one symbol per five words."""
    return len(_SYMBOL.findall(text)) > _MOST_SYMBOLS * len(_WORD.findall(text))


def _repeated_lines(text: str) -> bool:
    """Menus, boilerplate: more than 30 % of the lines are repetitions."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return len(lines) - len(set(lines)) > _MOST_REPEATED * len(lines)


def _repeated_phrases(text: str) -> bool:
    """Loops: more than 30 % of the 5-grams of words are repetitions."""
    words = _WORD.findall(text)
    phrases = Counter(zip(*(islice(words, first, None) for first in range(_PHRASE)), strict=False))
    return phrases.total() - len(phrases) > _MOST_REPEATED * phrases.total()


# The quality heuristics, in this order; a document is counted by the first that drops it.
QUALITY: dict[str, Callable[[str], bool]] = {
    "few_letters": _few_letters,
    "odd_words": _odd_words,
    "many_symbols": _many_symbols,
    "repeated_lines": _repeated_lines,
    "repeated_phrases": _repeated_phrases,
}
