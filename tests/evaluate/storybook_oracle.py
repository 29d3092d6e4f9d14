"""The storybook as a byte-level language model: the exact probability of every byte, given those before."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import tokenizers
import torch
from torch import Tensor

from gemmule.data.batches import PADDING
from gemmule.model.gemma3 import OutputHead
from gemmule.storybook.grammar import END, START, Line, Option, Tags, book, line_table, word_table
from gemmule.tokenizer import Tokenizer

BOS, EOS = "<bos>", "<eos>"
NEVER = -1e4  # a logit that no probability is left for


def byte_tokenizer() -> Tokenizer:
    """Return a vocabulary of the 256 bytes, bos and eos."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([BOS, EOS])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, library.token_to_id(BOS))]
    )
    return Tokenizer(library.to_str(), {})


class Place(NamedTuple):
    """A place in a story that is being told."""

    moment: str
    line: Line | None  # None before it is chosen
    part: int
    rest: str  # of the text that is decided
    tags: Tags
    chosen: dict[str, Option]

    def decided(self) -> "Iterator[tuple[float, Place]]":
        """Yield where the story may go until more text is decided, with the probabilities."""
        if self.rest or (self.line is None and self.moment == END):
            yield 1.0, self
        elif self.line is None:
            lines = line_table(self.moment, self.tags & book().asks[self.moment])
            for line in lines.options:
                start = "" if self.moment == START else "\n" if line.paragraph else " "
                place = Place(self.moment, line, 0, start, self.tags | line.gives, self.chosen)
                yield from _weighted(line.weight / lines.total, place)
        elif self.part == len(self.line.parts):
            yield from Place(self.line.following, None, 0, "", self.tags, self.chosen).decided()
        else:
            part = self.line.parts[self.part]
            following = self._replace(part=self.part + 1)
            if isinstance(part, str):
                yield from following._replace(rest=part).decided()
            elif not part.fresh:
                yield from following._replace(rest=part.render(self.chosen[part.variable])).decided()
            else:
                words = word_table(part.variable, self.tags & book().asks[part.variable])
                for word in words.options:
                    place = following._replace(
                        rest=part.render(word),
                        tags=self.tags | word.gives,
                        chosen=self.chosen | {part.variable: word},
                    )
                    yield from _weighted(word.weight / words.total, place)


def _weighted(weight: float, place: Place) -> Iterator[tuple[float, Place]]:
    for probability, found in place.decided():
        yield weight * probability, found


def byte_probabilities(text: str) -> Iterator[dict[str, float]]:
    """Yield the probabilities of the next character at each place of a text, its end ("") included."""
    places = [(1.0, Place(START, None, 0, "", frozenset(), {}))]
    for character in [*text, ""]:
        places = [(weight * more, found) for weight, place in places for more, found in place.decided()]
        following: dict[str, float] = defaultdict(float)
        for weight, place in places:
            following[place.rest[:1]] += weight
        total = sum(following.values())
        yield {each: weight / total for each, weight in following.items()}
        places = [
            (weight / total, place._replace(rest=place.rest[1:]))
            for weight, place in places
            if place.rest[:1] == character
        ]


class Oracle(torch.nn.Module):
    """Stands for a Gemma 3 that knows the storybook by heart."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        from tiny import tiny_config

        self.config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
        self.embedding = torch.nn.Embedding(tokenizer.vocab_size, 1)
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor, documents: Tensor, output_head: OutputHead, **_: Any) -> Tensor:
        """Predict, as Gemma3.forward does; the hidden states are the logits."""
        vocabulary = self.tokenizer.vocab_size
        logits = torch.full((*tokens.shape, vocabulary), NEVER)
        for row, numbers in enumerate(documents):
            for number in set(numbers.tolist()) - {PADDING}:
                where = (numbers == number).nonzero()[:, 0]
                text = self.tokenizer.decode(tokens[row, where].tolist())
                for place, probabilities in zip(where.tolist(), byte_probabilities(text), strict=True):
                    for character, probability in probabilities.items():
                        token = self.tokenizer.encode(character)[1] if character else self.tokenizer.eos_id
                        logits[row, place, token] = math.log(probability)
        return output_head(logits, torch.eye(vocabulary))
