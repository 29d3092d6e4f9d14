"""Text with everything that goes wrong."""

import random

_PLAIN = "the a little fox found red kite near old mill and gave it to her friend who said thank you very much but"
_MORE = (
    "then rain came down so they ran home where warm soup was ready Mia Tom Ana over under every never once upon time"
)
_ODD = """don't can't "Look!" "Where?" 12 345 6.7 (yes) one--two na\u00efve caf\u00e9 \u4f60\u597d \u4e16\u754c"""
WORDS = [*_PLAIN.split(), *_MORE.split(), *_ODD.split()]


def sentences(count: int, seed: int) -> list[str]:
    """Draw documents of a few lines from the words above."""
    chance = random.Random(seed)
    separators = [" ", " ", " ", " ", ", ", ". ", "\n", "\n\n", "  ", "\t"]
    return [
        "".join(chance.choice(WORDS) + chance.choice(separators) for _ in range(chance.randrange(5, 60)))
        for _ in range(count)
    ]
