"""Low-rank adapters (LoRA, DoRA) on a frozen Gemma 3, applied from outside, and merged into its weights.

LoRA (Hu et al., arXiv 2106.09685) adds scale * B A to a frozen matrix W, with A (rank, in) and B (out, rank); rsLoRA
(arXiv 2312.03732) scales by alpha / sqrt(rank). DoRA (arXiv 2402.09353) then gives each row of the sum a learned
length. Beside them, rows of the embedding can learn. All of it computes what the library peft does.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemmule.model.gemma3 import Gemma3, OutputHead, all_logits
from gemmule.model.init import meta_model

# The matrices of a block, by their names in it.
MATRICES = (
    "attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down",
)  # fmt: skip
Full = Callable[[Tensor], Tensor]  # a parameter, of which a process may have a shard -> its full values


class LoRA(NamedTuple):
    """The kind and the shape of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = MATRICES
    dropout: float = 0.0  # of the adapter's input
    rank_stabilized: bool = False
    dora: bool = False
    rows: tuple[int, ...] = ()  # ids of tokens whose embedding learns

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoRALinear(nn.Linear):
    """A frozen linear layer with a low-rank update in fp32; where B is 0 it computes what the layer alone does."""

    def __init__(self, base: nn.Linear, lora: LoRA) -> None:
        super(nn.Linear, self).__init__()  # the weight is the layer's, and not drawn
        self.in_features, self.out_features, self.lora = base.in_features, base.out_features, lora
        self.weight = base.weight
        self.register_parameter("bias", None)
        self.lora_a = _parameter(base, lora.rank, base.in_features)
        self.lora_b = _parameter(base, base.out_features, lora.rank)
        self.magnitude = _parameter(base, base.out_features) if lora.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (..., in) by the layer and its adapter; the result has the layer's dtype."""
        lora, a, b = self.lora, self.lora_a, self.lora_b
        y = functional.linear(x, self.weight)
        dropped = functional.dropout(x, lora.dropout, self.training)
        # Where matmuls are not in bf16 anyway, the adapter computes in its own fp32.
        given = dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(a.dtype)
        update = functional.linear(functional.linear(given, a), b) * lora.scale
        if self.magnitude is None:
            return y + update.to(y.dtype)
        gain = self.magnitude / self._row_norms()
        base = functional.linear(dropped, self.weight) if lora.dropout and self.training else y
        return y + ((gain - 1) * base + gain * update).to(y.dtype)

    def merged(self, full: Full) -> Tensor:
        """Return the weight (out, in) with the adapter in it, fp32."""
        weight, a, b = (full(each.detach()).float() for each in (self.weight, self.lora_a, self.lora_b))
        weight = torch.addmm(weight, b, a, alpha=self.lora.scale)
        if self.magnitude is None:
            return weight
        return weight * (full(self.magnitude.detach()).float() / _norms(weight))[:, None]

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Return the norms of W + scale B A (out); DoRA takes them for constants."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a, b = self.lora_a.float(), self.lora_b.float()
            return _norms(torch.addmm(self.weight.float(), b, a, alpha=self.lora.scale))


def _parameter(base: nn.Linear | nn.Embedding, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=base.weight.device))


def _norms(weight: Tensor) -> Tensor:
    return weight.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


class RowsEmbedding(nn.Embedding):
    """A frozen embedding in which some rows learn: `rows` (number, D) in fp32 take the place of those of `ids`."""

    ids: Tensor

    def __init__(self, base: nn.Embedding, ids: tuple[int, ...]) -> None:
        super(nn.Embedding, self).__init__()
        self.num_embeddings, self.embedding_dim, self.chosen = base.num_embeddings, base.embedding_dim, ids
        self.weight = base.weight
        self.rows = _parameter(base, len(ids), base.embedding_dim)
        numbers = torch.tensor(ids, dtype=torch.long, device=base.weight.device)
        self.register_buffer("ids", numbers, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up, (B,T,D)."""
        found = functional.embedding(tokens, self.weight)
        is_row = tokens[..., None] == self.ids
        rows = functional.embedding(is_row.int().argmax(dim=-1), self.rows).to(found.dtype)
        return torch.where(is_row.any(dim=-1, keepdim=True), rows, found)

    def vocabulary(self) -> Tensor:
        """Return the matrix of the tied head (V,D); its gradient reaches the rows."""
        return self.weight.index_copy(0, self.ids, self.rows.to(self.weight.dtype))

    def merged(self, full: Full) -> Tensor:
        """Return the weight (V,D) with the rows in it, fp32."""
        weight, rows = full(self.weight.detach()).float(), full(self.rows.detach()).float()
        return weight.index_copy(0, torch.tensor(self.chosen, dtype=torch.long, device=weight.device), rows)


def add_lora(model: Gemma3, lora: LoRA) -> None:
    """Freeze a model and put adapters on it that change nothing until `init_lora`, or values, are written into them.

    What then requires a gradient are the adapters alone. Rows learn in models with tied embeddings only.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for target in lora.targets:
            owner, _, name = target.rpartition(".")
            parent = block.get_submodule(owner)
            setattr(parent, name, LoRALinear(parent.get_submodule(name), lora))  # type: ignore[arg-type]
    if lora.rows:
        assert model.head is None, "rows of the vocabulary learn in both uses, or not at all"
        model.embedding = RowsEmbedding(model.embedding, lora.rows)
        model.register_forward_pre_hook(_read_out_rows, with_kwargs=True)


def _read_out_rows(model: Gemma3, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the output head the vocabulary with the rows that learn."""
    assert len(arguments) < 5, "the output head is given by its name"
    head: OutputHead = options.get("output_head", all_logits)
    embedding = model.embedding
    assert isinstance(embedding, RowsEmbedding)
    return arguments, options | {"output_head": lambda hidden, _: head(hidden, embedding.vocabulary())}


@torch.no_grad()
def init_lora(
    model: Gemma3,
    seed: int,
    copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    full: Full = lambda values: values,
) -> None:
    """Draw every A from U(-1/sqrt(in), 1/sqrt(in)), as a pure function of the seed; the model computes what it did.

    B is 0, magnitudes are the lengths of the rows of W, and rows of the vocabulary those of the embedding. Call it when
    the base has its weights. `copy(parameter, values)` writes a parameter's full values.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            drawn = torch.rand(module.lora_a.shape, generator=generator, dtype=torch.float32)
            copy(module.lora_a, (2 * drawn - 1) / math.sqrt(module.in_features))
            copy(module.lora_b, torch.zeros(module.lora_b.shape, dtype=torch.float32))
            if module.magnitude is not None:
                copy(module.magnitude, _norms(full(module.weight.detach()).float()))
        elif isinstance(module, RowsEmbedding):
            module.ids.copy_(torch.tensor(module.chosen, dtype=torch.long))
            copy(module.rows, full(module.weight.detach())[list(module.chosen)].float())


def lora_of(model: Gemma3) -> LoRA | None:
    """Return the kind of a model's adapters; None where it has none."""
    return next((module.lora for module in model.modules() if isinstance(module, LoRALinear)), None)


def changes_nothing(model: Gemma3) -> bool:
    """Whether the adapters of a model are still the identity, with every B zero and every row as the base has it."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            stretched = module.magnitude is not None and not torch.allclose(
                module.magnitude, _norms(module.weight.float()), rtol=1e-5
            )
            if stretched or bool(module.lora_b.any()):
                return False
        elif isinstance(module, RowsEmbedding) and not torch.equal(
            module.rows, module.weight[list(module.chosen)].float()
        ):
            return False
    return True


def merged_weights(model: Gemma3, full: Full = lambda values: values) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of each weight of the plain model: merged ones in fp32, others as they are."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | RowsEmbedding):
            yield f"{name}.weight", module.merged(full)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{own}", full(parameter.detach())


def merge(model: Gemma3, dtype: torch.dtype = torch.float32) -> Gemma3:
    """Return a plain model with the adapters in its weights: merged in fp32, and rounded once, to `dtype`.

    Weights that no adapter changes, and that have the dtype, are shared with the model.
    """
    plain = meta_model(model.config, model.kernel)
    for name, values in merged_weights(model):
        owner, _, own = name.rpartition(".")
        setattr(plain.get_submodule(owner), own, nn.Parameter(values.to(dtype)))
    return plain.train(model.training)
