"""Which documents are not worth learning: by length, by pattern, and by signs of bad quality in any language."""

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

_PHRASE = 5  # words
_FEWEST_LETTERS = 0.5  # of what is not space
_SHORTEST_WORD, _LONGEST_WORD = 1.5, 15.0  # characters, in the mean
_MOST_SYMBOLS = 0.2  # a word
_MOST_REPEATED = 0.3  # of the lines; of the phrases


def reason_to_drop(text: str, settings: DataSettings) -> str | None:
    """Return the name of the first filter that a text does not pass, or None."""
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
    """Tables, numbers, markup: less than half of the characters are letters."""
    return sum(map(str.isalpha, text)) < _FEWEST_LETTERS * len("".join(text.split()))


def _odd_words(text: str) -> bool:
    """Letters one by one, or keys and base64: words of less than 1.5 or more than 15 characters in the mean."""
    words = _SPACED_WORD.findall(text)
    mean = sum(map(len, words)) / max(1, len(words))
    return 2 * len(words) > len(_WORD.findall(text)) and not _SHORTEST_WORD <= mean <= _LONGEST_WORD


def _many_symbols(text: str) -> bool:
    """Code, markup, lists of hashtags: more than one symbol for five words."""
    return len(_SYMBOL.findall(text)) > _MOST_SYMBOLS * len(_WORD.findall(text))


def _repeated_lines(text: str) -> bool:
    """Menus, boilerplate: more than three lines of ten are a line that has come before."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return len(lines) - len(set(lines)) > _MOST_REPEATED * len(lines)


def _repeated_phrases(text: str) -> bool:
    """Loops: more than three of ten phrases of five words have come before."""
    words = _WORD.findall(text)
    phrases = Counter(zip(*(islice(words, first, None) for first in range(_PHRASE)), strict=False))
    return phrases.total() - len(phrases) > _MOST_REPEATED * phrases.total()


# The signs of bad quality, in this order; a document is counted by the first that it shows.
QUALITY: dict[str, Callable[[str], bool]] = {
    "few_letters": _few_letters,
    "odd_words": _odd_words,
    "many_symbols": _many_symbols,
    "repeated_lines": _repeated_lines,
    "repeated_phrases": _repeated_phrases,
}
