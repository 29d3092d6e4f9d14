"""What a Gemma 3 is, in numbers: the settings of `[model]`, under Hugging Face's names, and the official sizes."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gemmule.recipe import Problem, Settings

Kind = Literal["local", "global"]
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]

# The text models as published (Gemma 3 technical report, table 1, and the released config.json files).
SIZES: dict[str, dict[str, int | float]] = {
    "270m": {
        "vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "max_position_embeddings": 32_768,
    },
    "1b": {
        "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "max_position_embeddings": 32_768,
    },
    "4b": {
        "vocab_size": 262_208, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "max_position_embeddings": 131_072, "rope_scaling_factor": 8.0,
    },
    "12b": {
        "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "max_position_embeddings": 131_072, "rope_scaling_factor": 8.0,
    },
    "27b": {
        "vocab_size": 262_208, "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
        "sliding_window": 1024, "max_position_embeddings": 131_072, "rope_scaling_factor": 8.0,
    },
}  # fmt: skip


class Gemma3Config(Settings):
    """The shape and constants of one Gemma 3 text model; defaults are the 270M's.

    In a recipe, `model.size = "1b"` stands for that size's numbers; keys beside it override them.
    """

    size: Literal["270m", "1b", "4b", "12b", "27b"] | None = Field(default=None, exclude=True)
    vocab_size: Count = 262_144
    hidden_size: Count = 640
    intermediate_size: Count = 2048
    num_hidden_layers: Count = 18
    num_attention_heads: Count = 4
    num_key_value_heads: Count = 1
    head_dim: Count = 256
    # Attention scores are divided by the square root of this; it equals head_dim except in the 27B.
    query_pre_attn_scalar: Count = 256
    # A local layer's token sees itself and the sliding_window - 1 tokens before it.
    sliding_window: Count = 512
    # Every n-th layer is global, the others are local.
    sliding_window_pattern: Count = 6
    rope_theta: Annotated[float, Field(gt=0)] = 1_000_000.0
    rope_local_base_freq: Annotated[float, Field(gt=0)] = 10_000.0
    # Positions of global layers are divided by this.
    rope_scaling_factor: Annotated[float, Field(ge=1)] = 1.0
    max_position_embeddings: Count = 32_768
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    tie_word_embeddings: bool = True
    # Standard deviation of the first weights.
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    # Gemma trains without dropout; the residual branches and the attention weights can have it.
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if isinstance(size, str) and size in SIZES:
            values = SIZES[size] | {key: value for key, value in values.items() if key != "size"}
        return values

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        """Whether each layer is local (sees the window) or global (sees everything before)."""
        pattern = self.sliding_window_pattern
        return tuple("global" if (i + 1) % pattern == 0 else "local" for i in range(self.num_hidden_layers))

    def window(self, kind: Kind) -> int | None:
        """How many tokens, itself included, a token of a layer of this kind sees; None means all."""
        return self.sliding_window if kind == "local" else None

    def rope(self, kind: Kind) -> tuple[float, float]:
        """The base of a kind's rotary frequencies, and the factor by which its positions are divided."""
        return (self.rope_local_base_freq, 1.0) if kind == "local" else (self.rope_theta, self.rope_scaling_factor)

    def problems(self) -> Iterator[Problem]:
        """Yield the combinations of shapes that no Gemma 3 can have."""
        if self.num_attention_heads % self.num_key_value_heads:
            heads = self.num_attention_heads
            fits = [n for n in range(1, min(heads, 128) + 1) if heads % n == 0]
            yield Problem("num_key_value_heads", self.num_key_value_heads, f"must divide num_attention_heads: {fits}")
        if self.head_dim % 2:
            yield Problem("head_dim", self.head_dim, "must be even, because rotary embeddings turn pairs")
        if self.hidden_size % self.num_attention_heads:
            # Not needed by the arithmetic, but transformers refuses to open such a model.
            advice = f"must be a multiple of num_attention_heads ({self.num_attention_heads})"
            yield Problem("hidden_size", self.hidden_size, advice)
