"""The architecture as a drawing: layers, local and global, their parts with shapes and parameters."""

from typing import TYPE_CHECKING, NamedTuple

from gemmule.model.config import Gemma3Config
from gemmule.report.figures import large

if TYPE_CHECKING:
    from markupsafe import Markup

_WIDTH, _PER_ROW, _CELL = 720, 16, 41


class TensorShape(NamedTuple):
    """Weights of one name: what they do, their shape, and how many layers have them (1 outside the layers)."""

    name: str
    part: str
    shape: tuple[int, ...]
    layers: int

    @property
    def parameters(self) -> int:
        """All numbers in them, over all layers."""
        count = self.layers
        for size in self.shape:
            count *= size
        return count


def tensor_shapes(config: Gemma3Config) -> list[TensorShape]:
    """Return every weight of a model of this shape, in the order in which a token meets it."""
    width, mlp, head, layers = config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    inside = [
        ("input norm", "norms", (width,)),
        ("query", "attention", (queries, width)),
        ("key", "attention", (keys, width)),
        ("value", "attention", (keys, width)),
        ("query norm", "norms", (head,)),
        ("key norm", "norms", (head,)),
        ("output", "attention", (width, queries)),
        ("norm after attention", "norms", (width,)),
        ("norm before the MLP", "norms", (width,)),
        ("gate", "MLP", (mlp, width)),
        ("up", "MLP", (mlp, width)),
        ("down", "MLP", (width, mlp)),
        ("norm after the MLP", "norms", (width,)),
    ]
    shapes = [TensorShape("embedding", "embedding", (config.vocab_size, width), 1)]
    shapes += [TensorShape(name, part, shape, layers) for name, part, shape in inside]
    shapes.append(TensorShape("final norm", "norms", (width,), 1))
    if not config.tie_word_embeddings:
        shapes.append(TensorShape("output head", "output head", (config.vocab_size, width), 1))
    return shapes


def parameter_counts(config: Gemma3Config) -> dict[str, int]:
    """Return the number of parameters by part of the model."""
    counts = dict[str, int]()
    for weights in tensor_shapes(config):
        counts[weights.part] = counts.get(weights.part, 0) + weights.parameters
    return counts


def architecture_svg(config: Gemma3Config, identity: str) -> "Markup":
    """Draw a model: embedding, every layer in its color, the parts of one layer, output; `identity` is unique."""
    from markupsafe import Markup

    kinds, counts = config.layer_kinds, parameter_counts(config)
    rows = -(-len(kinds) // _PER_ROW)
    parts = [
        _box(
            20,
            8,
            _WIDTH - 40,
            "part",
            f"embedding, {config.vocab_size:,} x {config.hidden_size:,}",
            counts["embedding"],
        )
    ]
    parts.append(_arrow(_WIDTH / 2, 52))
    top = 76
    for number, kind in enumerate(kinds):
        row, column = divmod(number, _PER_ROW)
        across = min(_PER_ROW, len(kinds) - row * _PER_ROW)
        left, height = (_WIDTH - across * _CELL + 5) / 2 + column * _CELL, top + row * 34
        parts.append(f'<rect class="{kind}" x="{left}" y="{height}" width="{_CELL - 5}" height="28" rx="4"/>')
        parts.append(
            f'<text class="ink" x="{left + (_CELL - 5) / 2}" y="{height + 19}" text-anchor="middle">{number + 1}</text>'
        )
    top += rows * 34 + 2
    parts.append(_arrow(_WIDTH / 2, top))
    head = "the embedding, transposed" if config.tie_word_embeddings else "a matrix of its own"
    parts.append(
        _box(20, top + 24, _WIDTH - 40, "part", f"RMSNorm, then the output head: {head}", counts.get("output head", 0))
    )
    top += 90
    parts.append(
        f'<text class="ink strong" x="20" y="{top}">One layer: two branches, each added to what it was given</text>'
    )
    parts += _branch(top + 12, ["RMSNorm", _attention(config), "RMSNorm"], counts["attention"])
    parts += _branch(top + 104, ["RMSNorm", _mlp(config), "RMSNorm"], counts["MLP"])
    total, height = sum(counts.values()), top + 200
    description = (
        f"{total:,} parameters in {len(kinds)} layers, of which {kinds.count('local')} are local, with a window of "
        f"{config.sliding_window:,} tokens, and {kinds.count('global')} global."
    )
    opening = Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc" class="architecture">'
        '<title id="{}-title">Architecture</title><desc id="{}-desc">{}</desc>'
    ).format(_WIDTH, height, *[identity] * 4, description)
    return opening + Markup("".join(parts)) + Markup("</svg>")


def _attention(config: Gemma3Config) -> list[str]:
    heads, keys, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return [
        f"attention: {heads} query head{'s' * (heads > 1)}, {keys} key and value head{'s' * (keys > 1)} of {head}",
        f"query {config.hidden_size:,} to {heads * head:,}, key and value to {keys * head:,}, RMSNorm, RoPE",
        f"local: the last {config.sliding_window:,} tokens; global: all before",
    ]


def _mlp(config: Gemma3Config) -> list[str]:
    return [
        "MLP: gate and up, GELU, down",
        f"{config.hidden_size:,} to {config.intermediate_size:,} and back",
    ]


def _branch(top: float, parts: list[str | list[str]], parameters: int) -> list[str]:
    """Draw a row of three boxes, the middle one with lines of text."""
    drawn, left = list[str](), 20.0
    for part in parts:
        width = 82 if isinstance(part, str) else 480
        lines = [part] if isinstance(part, str) else [*part, f"{large(parameters)} parameters in all layers"]
        drawn.append(f'<rect class="part" x="{left}" y="{top}" width="{width}" height="82" rx="6"/>')
        first = top + 41 - 9 * (len(lines) - 1) + 4
        for number, line in enumerate(lines):
            style = "ink strong" if number == 0 and len(lines) > 1 else "ink"
            drawn.append(_text(left + width / 2, first + 18 * number, style, line))
        left += width + 18
        if left < _WIDTH - 20:
            drawn.append(f'<path class="arrow" d="M{left - 17} {top + 41}h12m-5 -4l5 4l-5 4"/>')
    return drawn


def _box(left: float, top: float, width: float, style: str, text: str, parameters: int) -> str:
    counted = f"{text}: {large(parameters)} parameters" if parameters else text
    label = f'<text class="ink" x="{left + width / 2}" y="{top + 27}" text-anchor="middle">{counted}</text>'
    return f'<rect class="{style}" x="{left}" y="{top}" width="{width}" height="42" rx="6"/>{label}'


def _text(middle: float, baseline: float, style: str, text: str) -> str:
    return f'<text class="{style}" x="{middle}" y="{baseline}" text-anchor="middle">{text}</text>'


def _arrow(left: float, top: float) -> str:
    return f'<path class="arrow" d="M{left} {top}v18m-4 -5l4 5l4 -5"/>'
