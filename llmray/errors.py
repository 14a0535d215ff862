"""The errors that end a run with one clear message; everything else is a defect of llmray.

A message has three parts: what was found (with the value), what is required, what to do. Every
class derives from `LlmrayError` and the standard exception it replaces, takes the message alone,
and so survives pickling through Ray.
"""


class LlmrayError(Exception):
    """Base of all errors that the user can mend; `exit_code` is the process's."""

    exit_code = 1


class ArgumentsError(LlmrayError, ValueError):
    """The run file, the command line or a combination of keys is wrong."""

    exit_code = 2


class DataError(LlmrayError, ValueError):
    """A data set, a file or a row is missing or wrong; the message names file and row."""


class ModelError(LlmrayError, ValueError):
    """A model, adapter or tokenizer is missing, damaged or does not fit."""


class StoreError(LlmrayError, OSError):
    """A directory could not be written whole, or what lies there is not what was committed."""


class ClusterError(LlmrayError, RuntimeError):
    """The Ray cluster is not there, lacks resources, or its nodes differ."""


class CheckpointError(LlmrayError, RuntimeError):
    """A checkpoint is damaged, foreign, or leaves nothing to do."""


class TrainingError(LlmrayError, ArithmeticError):
    """Training went wrong in its numbers: a loss or gradient that is not finite."""


class RewardError(LlmrayError, RuntimeError):
    """A reward model or reward service gave no usable score."""
