"""The root of every error this project raises on purpose; the whole tree is drawn in inference/errors.py."""


class BlastoscopeError(Exception):
    """A sentence for the user: what is wrong, with which file, and the way out."""


class CheckpointError(BlastoscopeError):
    """A checkpoint folder is missing, incomplete, altered, or does not fit its architecture."""


class UnknownArchitectureError(BlastoscopeError):
    """No file in model_zoo/ carries that name."""


class WeightsError(BlastoscopeError):
    """Initial weights that do not exist, cannot be fetched, or do not fit the architecture."""
