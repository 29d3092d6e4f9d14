"""What a Gemma 3 is, in numbers: the settings of `[model]`, under Hugging Face's names, and the official sizes."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gemmule.fields import Noun, Text
from gemmule.settings import Problem, Settings

Kind = Literal["local", "global"]
# No published model has a size near it, and up to here the sizes of a tensor multiply without overflow.
Size = Annotated[int, Field(ge=1, le=2**20)]
# Up to here positions are exact in floating point, too.
_LARGEST = 2**53
Whole = Annotated[int, Field(ge=1)]
# Far beyond what models have, and what fp32 computes with; outside, angles and norms are NaN or infinite.
Constant = Annotated[float, Field(ge=1e-30, le=1e30)]
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

    size: Annotated[Text, Noun(f"one of {', '.join(SIZES)}")] | None = Field(
        None,
        exclude=True,
        description=f"a published size ({', '.join(SIZES)}) whose numbers are the defaults of all other keys",
    )
    vocab_size: Size = Field(
        262_144, description="rows of the embedding; leave it out in a recipe, and it follows the tokenizer"
    )
    hidden_size: Size = Field(640, description="width of the residual stream")
    intermediate_size: Size = Field(2048, description="width of the MLP")
    num_hidden_layers: Size = Field(18, description="layers (blocks)")
    num_attention_heads: Size = Field(4, description="query heads")
    num_key_value_heads: Size = Field(1, description="key and value heads, each shared by several query heads")
    head_dim: Size = Field(256, description="width of a head")
    query_pre_attn_scalar: Whole = Field(
        256, description="attention scores are divided by its square root; head_dim except in the 27B"
    )
    sliding_window: Whole = Field(
        512, description="tokens that a local layer sees: the token itself and those before it"
    )
    sliding_window_pattern: Whole = Field(6, description="every n-th layer is global, the others are local")
    rope_theta: Constant = Field(1_000_000.0, description="base of the rotary embedding of global layers")
    rope_local_base_freq: Constant = Field(10_000.0, description="base of the rotary embedding of local layers")
    rope_scaling_factor: Annotated[float, Field(ge=1, le=1e30)] = Field(
        1.0, description="positions of global layers are divided by this"
    )
    max_position_embeddings: Whole = Field(32_768, description="longest sequence of the model, in tokens")
    rms_norm_eps: Constant = Field(1e-6, description="added to the mean square in RMSNorm")
    tie_word_embeddings: bool = Field(True, description="whether the output head is the embedding")
    initializer_range: Constant = Field(0.02, description="standard deviation of the first weights")
    # Gemma trains without dropout.
    dropout: Rate = Field(0.0, description="dropout of the residual branches")
    attention_dropout: Rate = Field(0.0, description="dropout of the attention weights")

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
        return self.sliding_window if kind == "local" and self.sliding_window < _LARGEST else None

    def rope(self, kind: Kind) -> tuple[float, float]:
        """The base of a kind's rotary frequencies, and the factor by which its positions are divided."""
        return (self.rope_local_base_freq, 1.0) if kind == "local" else (self.rope_theta, self.rope_scaling_factor)

    def problems(self) -> Iterator[Problem]:
        """Yield sizes that do not exist, and the combinations of shapes that no Gemma 3 can have."""
        if self.size is not None:  # of those that exist the numbers have taken its place
            yield Problem("size", self.size, f"no such size; there are {', '.join(SIZES)}")
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
        for name in ("query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "max_position_embeddings"):
            if getattr(self, name) > _LARGEST:
                yield Problem(name, getattr(self, name), f"must be at most {_LARGEST:,}")
