"""The recipe: every setting that decides a run."""

from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from gemmule.data.settings import DataSettings
from gemmule.model.config import Gemma3Config
from gemmule.settings import NOTHING, Problem, Settings
from gemmule.tokenizer import TokenizerSettings
from gemmule.tracking import TrackingSettings
from gemmule.train.lora import LORA_LEARNING_RATE, LoRASettings
from gemmule.train.optim import OptimizerSettings
from gemmule.train.parallel import ParallelSettings
from gemmule.train.preferences import PreferenceSettings
from gemmule.train.rewards import RewardSettings, problems_of_rewards
from gemmule.train.schedule import ScheduleSettings
from gemmule.train.settings import TrainSettings


class Recipe(Settings):
    """Everything that decides a run."""

    data: DataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: Gemma3Config = Gemma3Config()
    train: TrainSettings
    lora: LoRASettings = LoRASettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    rewards: RewardSettings = RewardSettings()
    parallel: ParallelSettings = ParallelSettings()
    tracking: TrackingSettings = TrackingSettings()

    def problems(self) -> Iterator[Problem]:
        """Yield sections that do not fit each other."""
        own = self.model.vocab_size if gives_vocabulary(self.model) else None
        if own is not None and self.tokenizer.path is None and own < self.tokenizer.vocab_size:
            advice = f"must be at least tokenizer.vocab_size ({self.tokenizer.vocab_size}); leave it out to follow that"
            yield Problem("model.vocab_size", own, advice)
        for section in sorted(self.unused() & _KINDS.keys()):
            for key, value in getattr(self, section).changed().items():
                advice = f'is for data.kind = "{_KINDS[section]}", and it is "{self.data.kind}"; leave it out'
                yield Problem(f"{section}.{key}", value, advice)
        if self.data.kind == "preferences" and self.train.start is None:
            yield Problem("train.start", NOTHING, "name the MODEL that preferences are taught to")
        for key in ("dropout", "attention_dropout"):
            if self.data.kind == "preferences" and getattr(self.model, key):
                advice = "must be 0 for preferences: the reference is scored without it"
                yield Problem(f"model.{key}", getattr(self.model, key), advice)
        if self.lora.rank is not None:
            yield from self._lora_problems()
        if self.data.kind == "prompts":
            yield from problems_of_rewards(self.rewards, self.train, self.parallel.strategy)
        if self.schedule.restart_step and self.schedule.restart_step >= self.train.steps:
            advice = f"must be before train.steps ({self.train.steps})"
            yield Problem("schedule.restart_step", self.schedule.restart_step, advice)
        if self.train.context > self.model.max_position_embeddings:
            advice = f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})"
            yield Problem("train.context", self.train.context, advice)

    def _lora_problems(self) -> Iterator[Problem]:
        if self.train.start is None:
            yield Problem("train.start", NOTHING, "name the MODEL that the adapter is trained on")
        if self.optimizer.name != "adamw":
            yield Problem("optimizer.name", self.optimizer.name, "adapters are trained by adamw")
        if self.lora.base_precision == "bf16":
            advice = 'needs train.precision = "bf16", and parallel.strategy = "ddp"'
            if self.train.precision != "bf16" or self.parallel.strategy != "ddp":
                yield Problem("lora.base_precision", "bf16", advice)

    @model_validator(mode="before")
    @classmethod
    def _adapters_learn_faster(cls, table: Any) -> Any:
        """Set the default learning rate of adapters."""
        if isinstance(table, dict) and isinstance(lora := table.get("lora"), dict) and lora.get("rank") is not None:
            optimizer = table.get("optimizer", {})
            if isinstance(optimizer, dict):
                return table | {"optimizer": {"learning_rate": LORA_LEARNING_RATE} | optimizer}
        return table

    def unused(self) -> frozenset[str]:
        """Return the sections of other kinds of data, and of adapters where there is none."""
        others = {section for section, kind in _KINDS.items() if kind != self.data.kind}
        return frozenset(others | ({"lora"} if self.lora.rank is None else set()))


# Sections of an objective, by the kind of data that it learns from.
_KINDS = {"preferences": "preferences", "rewards": "prompts"}


def gives_vocabulary(settings: Gemma3Config | TokenizerSettings) -> bool:
    """Whether a section sets vocab_size itself, rather than following the tokenizer."""
    return "vocab_size" in settings.model_fields_set
