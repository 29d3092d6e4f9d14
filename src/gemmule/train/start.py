"""`train.start`: a run that continues from the weights, the shape and the tokenizer of a model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gemmule.data.dataset import Dataset, prepared_folder
from gemmule.errors import RecipeError
from gemmule.formats.adapter import Base, weights_sha256
from gemmule.formats.opening import is_repository
from gemmule.model.config import Gemma3Config
from gemmule.model.finite import refuse_nonfinite_weights
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import local_path
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.train.lora import Adapter, lora_of_settings
from gemmule.train.opening import load_with_path
from gemmule.train.recipe import Recipe, gives_vocabulary

# Settings of [model] that change no shape and no function of the weights, so that a recipe may choose them.
_OWN = frozenset({"dropout", "attention_dropout"})


class Start(NamedTuple):
    """The model that a run starts from, on the CPU."""

    name: str
    model: Gemma3
    tokenizer: Tokenizer
    path: Path  # that it was opened from

    def adapter(self, recipe: Recipe) -> Adapter | None:
        """Return the adapter that a recipe trains, and its base; None where it trains all weights."""
        if recipe.lora.rank is None:
            return None
        lora = lora_of_settings(recipe.lora, self.model, self.tokenizer)
        name = self.name if is_repository(local_path(self.name)) else str(self.path.resolve())
        return Adapter(lora, Base(name, weights_sha256(self.model)))

    def adopt(self, recipe: Recipe) -> Recipe:
        """Give a recipe the model's config and vocabulary; RecipeError lists the settings that contradict them."""
        problems = [str(problem) for problem in self._contradictions(recipe)]
        if problems:
            advice = f"train.start = {self.name} decides the shape and the tokenizer; leave these settings out"
            raise RecipeError("\n  ".join([advice, *problems]))
        own = {key: getattr(recipe.model, key) for key in _OWN}
        if self.adds_layers(recipe.model):
            own["num_hidden_layers"] = recipe.model.num_hidden_layers
        tokenizer = recipe.tokenizer.replace(vocab_size=self._ids)
        return recipe.replace(model=Gemma3Config(**self.model.config.model_dump() | own), tokenizer=tokenizer)

    def check_dataset(self, dataset: Dataset, recipe: Recipe) -> None:
        """Raise RecipeError where a dataset was prepared with another tokenizer."""
        if dataset.tokenizer.fingerprint != self.tokenizer.fingerprint:
            advice = (
                f"was prepared with another tokenizer than that of train.start = {self.name}; name its text instead"
            )
            raise RecipeError(f"data.train = {prepared_folder(recipe.data)}: {advice}")

    def copy_weights(self, model: Gemma3, copy: Callable[[Tensor, Tensor], object]) -> None:
        """Write the weights into a model of the same shape, or of more layers, by `copy(parameter, full values)`.

        The norms after attention and MLP of a further layer get gain 1 + w = 0, so that it is the identity and the
        model's logits are those of the one it starts from; the rest of the layer keeps the weights it has.
        """
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    copy(parameter, weights[name].detach().float())
                elif name.endswith(("post_attention_norm.weight", "post_mlp_norm.weight")):
                    copy(parameter, torch.full(parameter.shape, -1.0, dtype=torch.float32))

    def adds_layers(self, config: Gemma3Config) -> bool:
        """Whether a config sets more layers than the model has that training starts from."""
        own = self.model.config.num_hidden_layers
        return "num_hidden_layers" in config.model_fields_set and config.num_hidden_layers > own

    @property
    def _ids(self) -> int:
        # Google's 1B has a token without an embedding, which no text is encoded to.
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)

    def _contradictions(self, recipe: Recipe) -> Iterator[Problem]:
        config = self.model.config
        deeper = {"num_hidden_layers"} if self.adds_layers(recipe.model) and recipe.lora.rank is None else set()
        for key in sorted(recipe.model.model_fields_set - _OWN - deeper):
            given, own = getattr(recipe.model, key), getattr(config, key)
            if given != own:
                yield Problem(f"model.{key}", given, f"the model has {own!r}")
        if recipe.tokenizer.path is not None:
            yield Problem("tokenizer.path", recipe.tokenizer.path, "the model brings its tokenizer")
        elif gives_vocabulary(recipe.tokenizer) and recipe.tokenizer.vocab_size != self._ids:
            yield Problem("tokenizer.vocab_size", recipe.tokenizer.vocab_size, f"the model has {self._ids}")


def open_start(recipe: Recipe) -> Start | None:
    """Open the model of `train.start`, on the CPU; None where a recipe trains from scratch.

    Raises ModelError where there is none, or a weight of it is not finite.
    """
    name = recipe.train.start
    if name is None:
        return None
    model, tokenizer, path = load_with_path(name)
    refuse_nonfinite_weights(model, f"train.start = {name}")
    return Start(name, model, tokenizer, path)
