"""The errors a user can meet.

Each message is one line: what is wrong with which thing, and the mend.
Anything else that escapes is a bug of ours and keeps its stack trace.
"""


class RadioDistillError(Exception):
    """Base of every error that the command line prints as one line, without a stack trace."""


class ConfigError(RadioDistillError):
    """A recipe, an override or an argument that cannot be right."""


class UnknownNameError(ConfigError):
    """A name that no registry knows; the message lists the nearest known names."""


class WeightsError(RadioDistillError):
    """Weights that are missing, damaged, or belong to another model."""


class DataError(RadioDistillError):
    """Shards or images that are missing, damaged, or too often bad."""


class CheckpointError(RadioDistillError):
    """A checkpoint that could not be written or read whole."""


class ExportError(RadioDistillError):
    """A student that a format cannot hold, or an export that could not be written."""


class DivergedError(RadioDistillError):
    """Training that produced numbers which are not finite."""
