"""The plain networks of paper 000: the 13 configurations of its Table 3 as data."""

from dataclasses import dataclass
from functools import partial

import keras
from keras import layers

from model_zoo._architecture import MOMENTUM, Architecture, one_logit, start


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of Table 3.

    Attributes:
        title: the paper's name for it.
        blocks: 3x3 convolutions of 64 filters in each block; 2x2 max-pooling ends it.
        dense: units of the dense layer.
        optimizer: as a recipe spells it; two pairs of rows differ in nothing else.
        batch_norm: after every convolution.
        dropout: rate after every pooling and after the dense layer.
        zero_padding: one pixel around what every convolution reads.
    """

    title: str
    blocks: tuple[int, ...]
    dense: int = 128
    optimizer: str = "rmsprop"
    batch_norm: bool = False
    dropout: float = 0.0
    zero_padding: bool = False


TABLE_3 = {
    "1c1d": Configuration(title="1C1D", blocks=(1,), dense=512),
    "2c1d": Configuration(title="2C1D", blocks=(1, 1), dense=512),
    "3c1d": Configuration(title="3C1D", blocks=(1, 1, 1), dense=512),
    "2x2x1c1d_rmsprop": Configuration(title="2X2X1C1D, RMSprop", blocks=(2, 2, 1)),
    "2x2x1c1d_adam": Configuration(title="2X2X1C1D, Adam", blocks=(2, 2, 1), optimizer="adam"),
    "2x2x1c1d_bn_rmsprop": Configuration(title="2X2X1C1D, batch norm, RMSprop", blocks=(2, 2, 1), batch_norm=True),
    "2x2x1c1d_bn_adam": Configuration(title="2X2X1C1D, batch norm, Adam", blocks=(2, 2, 1), batch_norm=True, optimizer="adam"),
    "2x2x1c1d_dropout25": Configuration(title="2X2X1C1D, dropout .25", blocks=(2, 2, 1), dropout=0.25),
    "2x2x1c1d_dropout50": Configuration(title="2X2X1C1D, dropout .5", blocks=(2, 2, 1), dropout=0.5),
    "2x2c1d": Configuration(title="2X2C1D", blocks=(2, 2)),
    "2x2c1d_dropout25": Configuration(title="2X2C1D, dropout .25", blocks=(2, 2), dropout=0.25),
    "2x2c1d_dropout50": Configuration(title="2X2C1D, dropout .5", blocks=(2, 2), dropout=0.5),
    "1x1c1d_zeropadding_dropout": Configuration(
        title="1X1C-1D, zero padding, dropout", blocks=(1, 1), dropout=0.5, zero_padding=True
    ),
}


def _build(variant: str, *, input_size: int, weights: str | None = None) -> keras.Model:
    row = TABLE_3[variant]
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Flatten(name="flatten")(_features(row, cell))
    x = layers.Dense(row.dense, activation="relu", name="embedding")(x)
    if row.dropout:
        x = layers.Dropout(row.dropout, name="dropout")(x)
    model = keras.Model(cell, one_logit(x), name=f"vanilla.{variant}")
    start(model, weights, bare=lambda: keras.Model(cell, _features(row, cell)))
    return model


def _features(row: Configuration, cell):
    x = layers.Rescaling(1 / 255, name="rescale")(cell)
    for block, convolutions in enumerate(row.blocks, 1):
        for i in range(1, convolutions + 1):
            if row.zero_padding:
                x = layers.ZeroPadding2D(1, name=f"block{block}_pad{i}")(x)
            x = layers.Conv2D(64, 3, activation="relu", name=f"block{block}_conv{i}")(x)
            if row.batch_norm:
                x = layers.BatchNormalization(momentum=MOMENTUM, name=f"block{block}_bn{i}")(x)
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        if row.dropout:
            x = layers.Dropout(row.dropout, name=f"block{block}_dropout")(x)
    return x


VARIANTS = {
    variant: Architecture(
        name=f"vanilla.{variant}",
        title=f"Vanilla {row.title}",
        build=partial(_build, variant),
        input_size=256,
        cam_layers=(f"block{len(row.blocks)}_conv{row.blocks[-1]}",),
        source=f"Paper 000, Table 3, {row.title}. 1C1D (Dense 512) and 2X2C1D (Dense 128) are printed in full; the dense "
        "width of the others follows them, and that is ours.",
    )
    for variant, row in TABLE_3.items()
}
ARCHITECTURE = VARIANTS["2x2c1d_dropout50"]  # the paper's best
