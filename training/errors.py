"""Errors of training; the whole tree is drawn in inference/errors.py."""

from model_zoo import BlastoscopeError


class RecipeError(BlastoscopeError):
    """A recipe that cannot be read: the key, what was received, and the nearest valid name."""


class DataError(BlastoscopeError):
    """A folder of cells that cannot be trained on, with the way out."""
