"""placeholder"""

from collections.abc import Sequence

from gemmule.tokenizer import Tokenizer


class TextStream:
    """Text of a reply."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._decoder, self.stopped = tokenizer.stream_decoder(), False

    def feed(self, token: int) -> str:
        """Feed."""
        return self._decoder.feed(token)

    def end(self) -> str:
        """End."""
        return self._decoder.end()
