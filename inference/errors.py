"""Every error the app shows to a user.

BlastoscopeError                  the base: pages and commands catch this and show its sentence
├── CheckpointError               a checkpoint folder is missing, incomplete or altered      (model_zoo)
├── UnknownArchitectureError      no file in model_zoo/ carries that name                    (model_zoo)
├── WeightsError                  initial weights that do not exist or do not fit            (model_zoo)
├── InputError                    something the user gave cannot be used; names the file
│   ├── ImageError                one image: not an image, truncated, too large
│   ├── GateError                 an image, but not one segmented cell on black
│   └── ArchiveError              a ZIP, or one entry of it
├── LayerError                    a layer the checkpoint does not have, or that cannot be drawn
├── RecipeError, DataError        a recipe; a folder of cells that cannot be trained on     (training)
├── RunError                      a run folder that is not what was asked for               (training)
├── Stopped                       a person stopped the run; what was reached is kept        (training)
└── OutOfMemory                   too large a batch; the run tries again with smaller ones  (training)
"""

from model_zoo import BlastoscopeError


class InputError(BlastoscopeError):
    """`name: what is wrong and the way out.`"""

    def __init__(self, name: str, sentence: str):
        self.name, self.sentence = name, sentence
        super().__init__(f"{name}: {sentence}")

    def __reduce__(self):  # two arguments: the default would give pickle only one
        return type(self), (self.name, self.sentence)


class ImageError(InputError):
    """One file that cannot be read as an image."""


class GateError(InputError):
    """An image that is not one segmented cell on black."""


class ArchiveError(InputError):
    """A ZIP, or one entry of it, that is refused."""


class LayerError(BlastoscopeError):
    """A layer that the checkpoint does not have, or whose output is no map."""
