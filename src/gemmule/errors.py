"""Everything that can go wrong, by name.

    GemmuleError            a failure: exit code 1
    |-- TrainingError       the run cannot go on (the loss is no longer finite, no gradient reaches a parameter)
    `-- UserError           something the user can mend: exit code 2, one sentence, no traceback
        |-- RecipeError     a setting is unknown, of the wrong type, or impossible beside another
        |-- SourceError     raw text: a file is missing, empty, not UTF-8, not what its name says
        |-- TokenizerError  a vocabulary that cannot be trained, opened or used here
        |-- DatasetError    token shards: truncated, damaged, made with another tokenizer, too few tokens
        |-- ModelError      a model folder that is missing, incomplete or of another architecture
        |-- CheckpointError a checkpoint that is missing, damaged or of another run
        |-- OutputError     the place to write to: taken by another run, not writable, full
        |-- DeviceError     the machine cannot do what was asked (no such device, fp16)
        |-- PeerError       what a benchmark shall compare with is not there, or does not do that kind of work
        `-- MissingExtra    an optional library is not installed

A message names the setting or file, the value, and what would work.
"""


class GemmuleError(Exception):
    """A failure that Gemmule foresaw and can explain."""

    exit_code = 1


class TrainingError(GemmuleError):
    """The run cannot go on."""


class UserError(GemmuleError):
    """Something the user can mend."""

    exit_code = 2


class RecipeError(UserError):
    """A setting is unknown, of the wrong type, or impossible beside another."""


class SourceError(UserError):
    """Raw text is missing, empty, not UTF-8, or not what its name says."""


class TokenizerError(UserError):
    """A vocabulary that cannot be trained, opened or used here."""


class DatasetError(UserError):
    """Token shards are truncated, damaged, made with another tokenizer, or too few."""


class ModelError(UserError):
    """A model folder is missing, incomplete or of another architecture."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another run."""


class OutputError(UserError):
    """The place to write to is taken by another run, not writable, or full."""


class DeviceError(UserError):
    """The machine cannot do what was asked."""


class PeerError(UserError):
    """What a benchmark shall compare with is not there, or does not do that kind of work."""


class MissingExtra(UserError):  # noqa: N818 - it names what is missing
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(library, extra, purpose)  # as they were given, so that it can go from process to process

    def __str__(self) -> str:
        library, extra, purpose = self.args
        return f"{purpose} needs the library {library}, which is not installed: pip install 'gemmule[{extra}]'"
