"""The errors a user can meet.

Each message is one line: what is wrong with which thing, and the hint.
Anything else that escapes is a bug of ours and keeps its stack trace.
"""


class RadioDistillError(Exception):
    """Base of every error that the command line prints as one line, without a stack trace."""

    exit_status = 2
    """Exit status of a process that ends with it: 2 would fail again; after any other but 0 it may
    be started again."""

    def __str__(self) -> str:
        """Return one line for each argument: each is a problem."""
        return "\n".join(map(str, self.args))


class ConfigError(RadioDistillError):
    """A recipe, an override or an argument that cannot be right."""


class ChangedError(ConfigError):
    """A run is not made of what it would go on with; a command may have ways out of its own."""

    def __init__(self, problem: str, way_out: str = "add --allow-changed-recipe"):
        super().__init__(f"{problem}, or {way_out}")
        self.problem, self.way_out = problem, way_out

    def __reduce__(self) -> "tuple[type[ChangedError], tuple[str, str]]":
        """Go from process to process whole."""
        return type(self), (self.problem, self.way_out)


class UnknownNameError(ConfigError):
    """A name that no registry knows; the message lists the nearest known names."""


class NoLayersError(ConfigError):
    """An encoder that gives no inner layers, asked for some."""


class WeightsError(RadioDistillError):
    """Weights that are missing, damaged, or belong to another model."""


class DataError(RadioDistillError):
    """Shards or images that are missing, damaged, or too often bad."""


class CheckpointError(RadioDistillError):
    """A checkpoint that could not be written or read whole."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, but may not be read: no reason to take another."""


class ExportError(RadioDistillError):
    """A student that a format cannot hold, or an export that could not be written."""


class DivergedError(RadioDistillError):
    """Training that produced numbers which are not finite."""


class OutOfMemoryError(RadioDistillError):
    """A part of a step that did not fit into memory; the message names part, size and setting."""


class InterruptedRunError(RadioDistillError):
    """A run that was asked to stop by a signal, and has saved; ``--resume`` goes on with it."""

    exit_status = 75


class TakenOverError(RadioDistillError):
    """A run whose folder another, later started process has taken over; it must write no more."""

    exit_status = 76


HUNG_STATUS = 70
"""Exit status of a process that was ended because no step was finished for too long."""
