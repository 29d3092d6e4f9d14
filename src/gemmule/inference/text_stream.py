"""From tokens to text that may be shown: complete characters, up to the first stop string."""

from collections.abc import Sequence

from gemmule.errors import RecipeError
from gemmule.tokenizer import Tokenizer


class TextStream:
    """The text of one reply, token by token, up to the stop string that is completed first.

    Of several that are completed by the same character, the longest counts; so the text does not depend on how it is
    cut into tokens. What `feed` returned is at every moment the beginning of that text, as far as it is certain.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """Begin a reply; RecipeError for an empty stop string."""
        if "" in stop_strings:
            raise RecipeError('stop = "": every text contains it; leave it out')
        self.stopped = False  # whether a stop string was completed
        self.offsets: list[int] = []  # of each token: the characters of the reply that were complete before it
        self._complete = 0
        self._decoder = tokenizer.stream_decoder()
        self._stops = [_StopString(stop) for stop in stop_strings]
        self._held = ""  # complete characters with which a stop string could begin

    def feed(self, token: int) -> str:
        """Add a token, and return the text that may be shown now; none after a stop string."""
        self.offsets.append(self._complete)
        return "" if self.stopped else self._add(self._decoder.feed(token))

    def end(self) -> str:
        """Return the rest of a reply that ends here; none after a stop string."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.end())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _add(self, text: str) -> str:
        before, self._complete = self._held, self._complete + len(text)
        if not self._stops:
            return text
        for count, character in enumerate(text, 1):
            for stop in self._stops:
                stop.read(character)
            found = max((len(stop.text) for stop in self._stops if stop.is_complete), default=0)
            if found:
                self.stopped, self._held = True, ""
                return (before + text[:count])[:-found]
        begun = max(stop.matched for stop in self._stops)
        shown = len(before) + len(text) - begun
        self._held = (before + text)[shown:]
        return (before + text)[:shown]


class _StopString:
    """How much of a stop string the text ends with, by the algorithm of Knuth, Morris and Pratt."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # For each length: the longest shorter prefix that the prefix of this length ends with.
        self._shorter = [0] * (len(text) + 1)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._shorter[length]
            length += text[index] == text[length]
            self._shorter[index + 1] = length

    @property
    def is_complete(self) -> bool:
        return self.matched == len(self.text)

    def read(self, character: str) -> None:
        """Add a character of the text; not after the stop string was complete."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched]
        self.matched += self.text[self.matched] == character
