"""The recipe: every setting that decides a run."""

from collections.abc import Iterator

from gemmule.data.settings import DataSettings
from gemmule.model.config import Gemma3Config
from gemmule.settings import NOTHING, Problem, Settings
from gemmule.tokenizer import TokenizerSettings
from gemmule.tracking import TrackingSettings
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
        for section in sorted(self.unused()):
            for key in sorted(getattr(self, section).model_fields_set):
                advice = f'is for data.kind = "{_KINDS[section]}", and it is "{self.data.kind}"; leave it out'
                yield Problem(f"{section}.{key}", getattr(getattr(self, section), key), advice)
        if self.data.kind == "preferences" and self.train.start is None:
            yield Problem("train.start", NOTHING, "name the MODEL that preferences are taught to")
        if self.data.kind == "prompts":
            yield from problems_of_rewards(self.rewards, self.train, self.parallel.strategy)
        if self.schedule.restart_step and self.schedule.restart_step >= self.train.steps:
            advice = f"must be before train.steps ({self.train.steps})"
            yield Problem("schedule.restart_step", self.schedule.restart_step, advice)
        if self.train.context > self.model.max_position_embeddings:
            advice = f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})"
            yield Problem("train.context", self.train.context, advice)

    def unused(self) -> frozenset[str]:
        """Return the sections of objectives that this kind of data does not have."""
        return frozenset(section for section, kind in _KINDS.items() if kind != self.data.kind)


# Sections of an objective, by the kind of data that it learns from.
_KINDS = {"preferences": "preferences", "rewards": "prompts"}


def gives_vocabulary(settings: Gemma3Config | TokenizerSettings) -> bool:
    """Whether a section sets vocab_size itself, rather than following the tokenizer."""
    return "vocab_size" in settings.model_fields_set
