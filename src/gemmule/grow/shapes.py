"""The shapes among which `gemmule grow` chooses, with their parameters and floating-point operations."""

from gemmule.model.config import Gemma3Config
from gemmule.train.muon import ITERATIONS


def shape(width: int, layers: int, vocab_size: int) -> Gemma3Config:
    """Return the shape of a width and depth: an MLP of three times the width, one key/value head
    for four heads (for all, where their number is no multiple of four)."""
    head_dim = 64 if width % 64 == 0 and width > 64 else 32
    heads = width // head_dim
    return Gemma3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        sliding_window_pattern=min(layers, 6 if layers % 6 == 0 else 4),
        num_attention_heads=heads,
        num_key_value_heads=next(each for each in (heads // 4, 1) if each and heads % each == 0),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=128,
    )


def matrices(config: Gemma3Config) -> list[tuple[int, int]]:
    """Return the shapes of a block's matrices, the short side first."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    shapes = [(queries, width), (width, queries), (keys, width), (keys, width), *3 * [(inner, width)]]
    return [(min(shape), max(shape)) for shape in shapes]


def block_parameters(config: Gemma3Config) -> int:
    """Count the parameters in the matrices of all blocks."""
    return config.num_hidden_layers * sum(short * long for short, long in matrices(config))


def parameters(config: Gemma3Config) -> int:
    """Count all parameters of a model whose embedding is the head as well."""
    width, layers = config.hidden_size, config.num_hidden_layers
    norms = layers * (4 * width + 2 * config.head_dim) + width
    return block_parameters(config) + config.vocab_size * width + norms


def layer_flops(config: Gemma3Config, context: int) -> float:
    """Count the floating-point operations of a block for a token, forward and backward."""
    products = 6 * sum(short * long for short, long in matrices(config))
    span = min(context, config.sliding_window)
    return products + 12 * config.num_attention_heads * config.head_dim * span / 2


def head_flops(config: Gemma3Config) -> float:
    """Count the floating-point operations of the head for a token, forward and backward."""
    return 6.0 * config.vocab_size * config.hidden_size


def muon_flops(config: Gemma3Config) -> float:
    """Count the floating-point operations of Muon's update of all blocks."""
    one = sum(ITERATIONS * (4 * short * short * long + 2 * short**3) for short, long in matrices(config))
    return float(config.num_hidden_layers * one)
