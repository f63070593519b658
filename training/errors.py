"""Errors of training; the whole tree is drawn in inference/errors.py."""

from model_zoo import BlastoscopeError


class RecipeError(BlastoscopeError):
    """A recipe that cannot be read: the key, what was received, and the nearest valid name."""


class DataError(BlastoscopeError):
    """A folder of cells that cannot be trained on, with the way out."""


class RunError(BlastoscopeError):
    """A run folder that is not what was asked for, with the way out."""


class Stopped(BlastoscopeError):
    """A person stopped the run; what was reached is kept."""


class OutOfMemory(BlastoscopeError):
    """The device's memory is too small for a batch; it is tried with smaller ones."""


def why(error: BaseException) -> str:
    """What a run that ended tells of its end."""
    return "Stopped by Ctrl-C." if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


def halt(report) -> None:
    """Raise Stopped if a person asked for it; what takes long without a training step calls this between batches."""
    if report and report.stopping():
        raise Stopped("Stopped. A resumed run goes on from what is complete.")
