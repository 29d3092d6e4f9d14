"""Exception hierarchy and exit codes.

    GemmuleError            a failure: exit code 1
    |-- TrainingError       the run cannot continue (non-finite loss, a parameter without a gradient)
    `-- UserError           an error that the user can fix: exit code 2, one sentence, no traceback
        |-- RecipeError     a setting is unknown, of the wrong type, or in conflict with another
        |-- SourceError     raw text: a file is missing, empty, not UTF-8, or of another format
        |-- TokenizerError  a tokenizer cannot be trained, loaded or used here
        |-- DatasetError    token shards: truncated, damaged, made with another tokenizer, too few tokens
        |-- ModelError      a model is missing, incomplete, of another architecture, or has non-finite weights
        |-- CheckpointError a checkpoint is missing, damaged or of another run
        |-- OutputError     the output path is in use by another run, not writable, or full
        |-- TrackingError   a tracking service cannot be reached, refuses the key, or lost its process
        |-- DeviceError     the machine lacks a device or a precision
        `-- MissingExtra    an optional dependency is not installed

A message names the setting or file, the value, and a remedy.
"""


class GemmuleError(Exception):
    """Base class of expected errors."""

    exit_code = 1


class TrainingError(GemmuleError):
    """The run cannot continue."""


class UserError(GemmuleError):
    """An error that the user can fix."""

    exit_code = 2


class RecipeError(UserError):
    """A setting is unknown, of the wrong type, or in conflict with another."""


class SourceError(UserError):
    """Raw text is missing, empty, not UTF-8, or of another format."""


class TokenizerError(UserError):
    """A tokenizer cannot be trained, loaded or used here."""


class DatasetError(UserError):
    """Token shards are truncated, damaged, made with another tokenizer, or too few."""


class ModelError(UserError):
    """A model is missing, incomplete, of another architecture, or has non-finite weights."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another run."""


class OutputError(UserError):
    """The output path is in use by another run, not writable, or full."""


class TrackingError(UserError):
    """A tracking service cannot be reached, refuses the key, or lost its process."""


class DeviceError(UserError):
    """The machine lacks a device or a precision."""


class MissingExtra(UserError):  # noqa: N818 - it names what is missing
    """An optional dependency is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(library, extra, purpose)  # the arguments themselves, so that it can be pickled

    def __str__(self) -> str:
        library, extra, purpose = self.args
        return f"{purpose} needs the library {library}, which is not installed: pip install 'gemmule[{extra}]'"
