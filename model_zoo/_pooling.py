"""Pooling over the cell: parts that networks which read middle layers share. Black, the segmented background, has no say.

Why over the cell, why covariances: docs/decisions/0007.
"""

import keras
import numpy as np
from keras import layers, ops

from model_zoo._architecture import one_logit

_MIXTURES = 40  # of a layer's maps, whose covariance is taken


def _inside(cells):
    """(N, S, S, 3) -> (N, S, S, 1): 1 on the cell, 0 on the segmented black."""
    return ops.cast(ops.max(cells, axis=-1, keepdims=True) >= 1, "float32")


def _inside_onnx(g, cells):
    brightest = g.node("ReduceMax", [cells], axes=[1], keepdims=1)
    return g.node("Cast", [g.node("GreaterOrEqual", [brightest, g.constant(1.0)])], to=1)


def _total(x):
    return ops.sum(x, axis=(1, 2), keepdims=True)


def _total_onnx(g, x):
    return g.node("ReduceSum", [x, g.constant([2, 3], "int64")], keepdims=1)


def _centred(x, inside):
    """What differs from its own mean over the cell, 0 on black; and the cell's pixels (N, 1, 1, 1), and one."""
    count = _total(inside) + 1
    return (x - _total(x * inside) / count) * inside, count


def _centred_onnx(g, x, inside):
    count = g.node("Add", [_total_onnx(g, inside), g.constant(1.0)])
    mean = g.node("Div", [_total_onnx(g, g.node("Mul", [x, inside])), count])
    return g.node("Mul", [g.node("Sub", [x, mean]), inside]), count


def _standardised(x, inside):
    """In deviations from its own mean over the cell; 0 on black."""
    gap, count = _centred(x, inside)
    return gap / (ops.sqrt(_total(gap * gap) / count) + 1)


def _standardised_onnx(g, x, inside):
    gap, count = _centred_onnx(g, x, inside)
    variance = g.node("Div", [_total_onnx(g, g.node("Mul", [gap, gap])), count])
    return g.node("Div", [gap, g.node("Add", [g.node("Sqrt", [variance]), g.constant(1.0)])])


class _Float32(layers.Layer):
    """Whatever the network's precision."""

    def __init__(self, **options):
        super().__init__(**options | {"dtype": "float32"})


@keras.saving.register_keras_serializable("blastoscope")
class CellStandardise(_Float32):
    """Each channel of each cell to the mean and deviation of an average cell; black stays black.

    Takes away what a person's smear, its age and its staining add to every pixel alike.
    """

    MEAN, DEVIATION = (130.0, 90.0, 150.0), (38.0, 40.0, 30.0)

    def call(self, cells):
        inside = _inside(cells)
        scaled = _standardised(cells, inside) * np.float32(self.DEVIATION) + np.float32(self.MEAN)
        return ops.clip(scaled, 1, 255) * inside

    def compute_output_shape(self, input_shape):
        return input_shape

    def write_onnx(self, g, cells):
        inside = _inside_onnx(g, cells)
        scaled = g.node("Mul", [_standardised_onnx(g, cells, inside), g.per_channel(self.DEVIATION)])
        shifted = g.node("Add", [scaled, g.per_channel(self.MEAN)])
        return g.node("Mul", [g.node("Clip", [shifted, g.constant(1.0), g.constant(255.0)]), inside])


@keras.saving.register_keras_serializable("blastoscope")
class CellWhiten(_Float32):
    """The channels of each cell to one deviation and no correlation, about the mean of an average cell; black stays black.

    Takes away the cell's own axis of stain as well: what is left is how its places differ (ZCA, Bell & Sejnowski 1997).
    """

    _DEVIATION, _LEAST = 40.0, 4.0  # grey levels of a channel; variance that is noise
    _STEPS = 14  # of Newton's iteration for the inverse root (Higham 2008, ch. 6): no eigenvectors in ONNX

    def call(self, cells):
        inside, one = _inside(cells), ops.eye(3)
        gap, count = _centred(cells, inside)
        flat = ops.reshape(gap, (-1, gap.shape[1] * gap.shape[2], 3))
        covariance = ops.matmul(ops.transpose(flat, (0, 2, 1)), flat) / count[:, 0] + self._LEAST * one
        trace = ops.sum(covariance * one, axis=(1, 2), keepdims=True)
        root, inverse = covariance / trace, covariance * 0 + one
        for _ in range(self._STEPS):
            step = 1.5 * one - 0.5 * ops.matmul(inverse, root)
            root, inverse = ops.matmul(root, step), ops.matmul(step, inverse)
        white = ops.reshape(ops.matmul(flat, inverse / ops.sqrt(trace)), (-1, *gap.shape[1:]))
        return ops.clip(white * self._DEVIATION + np.float32(CellStandardise.MEAN), 1, 255) * inside

    def compute_output_shape(self, input_shape):
        return input_shape

    def write_onnx(self, g, cells):
        inside, one, half = _inside_onnx(g, cells), np.eye(3)[None], g.constant(0.5)
        gap, count = _centred_onnx(g, cells, inside)
        flat = g.node("Reshape", [gap, g.constant([0, 3, -1], "int64")])
        covariance = g.node("MatMul", [flat, g.node("Transpose", [flat], perm=[0, 2, 1])])
        covariance = g.node("Div", [covariance, g.node("Reshape", [count, g.constant([0, 1, 1], "int64")])])
        covariance = g.node("Add", [covariance, g.constant(self._LEAST * one)])
        diagonal = g.node("Mul", [covariance, g.constant(one)])
        trace = g.node("ReduceSum", [diagonal, g.constant([1, 2], "int64")], keepdims=1)
        root = g.node("Div", [covariance, trace])
        inverse = g.node("Add", [g.node("Mul", [covariance, g.constant(0.0)]), g.constant(one)])
        for _ in range(self._STEPS):
            step = g.node("Mul", [g.node("MatMul", [inverse, root]), half])
            step = g.node("Sub", [g.constant(1.5 * one), step])
            root, inverse = g.node("MatMul", [root, step]), g.node("MatMul", [step, inverse])
        white = g.node("MatMul", [g.node("Div", [inverse, g.node("Sqrt", [trace])]), flat])
        white = g.node("Reshape", [white, g.node("Shape", [cells])])
        white = g.node("Add", [g.node("Mul", [white, g.constant(self._DEVIATION)]), g.per_channel(CellStandardise.MEAN)])
        return g.node("Mul", [g.node("Clip", [white, g.constant(1.0), g.constant(255.0)]), inside])


@keras.saving.register_keras_serializable("blastoscope")
class QuarterTurns(layers.Layer):
    """(N, S, S, C) -> (4N, S, S, C): everything as it is, then everything by 90, 180 and 270 degrees.

    Of several inputs, V views of the same cells, everything is all of the first, then all of the second: (4VN, S, S, C).
    """

    def call(self, x):
        x = ops.concatenate(x, axis=0) if isinstance(x, (list, tuple)) else x
        return ops.concatenate([ops.rot90(x, turns, axes=(1, 2)) for turns in range(4)], axis=0)

    def compute_output_shape(self, input_shape):
        return input_shape[0] if isinstance(input_shape[0], (list, tuple)) else input_shape

    def write_onnx(self, g, *views):
        def mirror(x, *axes):
            minus, ends = [-1] * len(axes), [np.iinfo("int64").min] * len(axes)
            return g.node("Slice", [x, *(g.constant(v, "int64") for v in (minus, ends, axes, minus))])

        x = g.node("Concat", list(views), axis=0) if len(views) > 1 else views[0]
        aside = g.node("Transpose", [x], perm=[0, 1, 3, 2])
        return g.node("Concat", [x, mirror(aside, 2), mirror(x, 2, 3), mirror(aside, 3)], axis=0)


@keras.saving.register_keras_serializable("blastoscope")
class TurnsMean(layers.Layer):
    """(4VN, D) -> (N, VD): mean over the turns of `QuarterTurns`, its V views side by side."""

    def __init__(self, views: int = 1, **options):
        super().__init__(**options)
        self.views = views

    def call(self, x):
        mean = ops.mean(ops.reshape(x, (4, self.views, -1, x.shape[-1])), axis=0)
        return ops.reshape(ops.transpose(mean, (1, 0, 2)), (-1, self.views * x.shape[-1]))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.views * input_shape[-1])

    def get_config(self):
        return super().get_config() | {"views": self.views}

    def write_onnx(self, g, x):
        turns = g.node("Reshape", [x, g.constant([4, self.views, -1, self.input.shape[-1]], "int64")])
        mean = g.node("ReduceMean", [turns], axes=[0], keepdims=0)
        return g.node("Flatten", [g.node("Transpose", [mean], perm=[1, 0, 2])])


@keras.saving.register_keras_serializable("blastoscope")
class CellMask(_Float32):
    """(N, S, S, 3) -> (N, S, S, 1): 1 on the cell, 0 on the segmented black."""

    def call(self, cells):
        return _inside(cells)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 1)

    def write_onnx(self, g, cells):
        return _inside_onnx(g, cells)


@keras.saving.register_keras_serializable("blastoscope")
class CellSize(_Float32):
    """(N, S, S, 1), 1 on the cell -> (N, 1): the logarithm of its number of pixels.

    What is pooled over the cell has lost its size, the one thing that no stain, lamp or focus changes.
    """

    def call(self, inside):
        return ops.log(ops.sum(inside, axis=(1, 2)) + 1)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)

    def write_onnx(self, g, inside):
        return g.node("Log", [g.node("Flatten", [g.node("Add", [_total_onnx(g, inside), g.constant(1.0)])])])


@keras.saving.register_keras_serializable("blastoscope")
class DarknessBands(_Float32):
    """(N, S, S, 3) -> (N, S, S, 3): shares of a place in the dark, the middling and the light part of its cell; none on black.

    Dark is dense chromatin, light is cytoplasm, nucleoli and open chromatin. In deviations from the cell's own mean, so
    another stain or lamp moves the bands along.
    """

    CENTRES = np.array([-0.9, -0.1, 0.9], "float32")
    _STEEP, _SMOOTH = 4.0, 5  # of the bands' edges; pixels a side, over which brightness is averaged

    def call(self, cells):
        inside = _inside(cells)

        def average(x):
            return ops.average_pool(x, self._SMOOTH, 1, "same", data_format="channels_last")

        grey = average(ops.mean(cells, axis=-1, keepdims=True) * inside) / (average(inside) + 1e-3)
        # exp(-steep (z - centre)^2), over all bands; z^2 is the same in each
        near = 2 * self.CENTRES * _standardised(grey, inside) - self.CENTRES**2
        return ops.softmax(self._STEEP * near, axis=-1) * inside

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], len(self.CENTRES))

    def write_onnx(self, g, cells):
        inside = _inside_onnx(g, cells)

        def average(x):
            side = self._SMOOTH
            return g.node("AveragePool", [x], kernel_shape=[side, side], auto_pad="SAME_UPPER")

        bright = g.node("Mul", [g.node("ReduceMean", [cells], axes=[1], keepdims=1), inside])
        grey = g.node("Div", [average(bright), g.node("Add", [average(inside), g.constant(1e-3)])])
        z = _standardised_onnx(g, grey, inside)
        near = g.node("Mul", [z, g.per_channel(2 * self._STEEP * self.CENTRES)])
        near = g.node("Sub", [near, g.per_channel(self._STEEP * self.CENTRES**2)])
        return g.node("Mul", [g.node("Softmax", [near], axis=1), inside])


class _MaskedPooling(_Float32):
    """Pools maps over the cell. Takes maps times shares (N, H, W, C), and shares (N, H, W, 1): how much of a place is cell."""

    _LEAST = 1e-6  # a share, where it divides

    @classmethod
    def _flat(cls, shared, shares):
        """(N, HW, C): the maps as they were before they were multiplied."""
        places = shared.shape[1] * shared.shape[2]
        return ops.reshape(shared / (shares + cls._LEAST), (-1, places, shared.shape[-1]))

    @staticmethod
    def _weights(shares):
        """(N, H, W, R) -> (N, HW, R): each adds up to 1 over the places (to 0 where there is nothing of it)."""
        shares = ops.reshape(shares, (-1, shares.shape[1] * shares.shape[2], shares.shape[-1]))
        return shares / (ops.sum(shares, axis=1, keepdims=True) + 1e-3)

    @classmethod
    def _flat_onnx(cls, g, shared, shares):
        """(N, C, HW)."""
        maps = g.node("Div", [shared, g.node("Add", [shares, g.constant(cls._LEAST)])])
        return g.node("Reshape", [maps, g.constant([0, 0, -1], "int64")])

    @staticmethod
    def _weights_onnx(g, shares):
        """(N, R, HW)."""
        shares = g.node("Reshape", [shares, g.constant([0, 0, -1], "int64")])
        total = g.node("Add", [g.node("ReduceSum", [shares, g.constant([2], "int64")], keepdims=1), g.constant(1e-3)])
        return g.node("Div", [shares, total])


@keras.saving.register_keras_serializable("blastoscope")
class MaskedMoments(_MaskedPooling):
    """-> (N, 2C): mean and standard deviation of each map over the cell.

    With a third input, regions (N, H, W, R), of each of those apart: (N, 2RC).
    """

    def call(self, inputs):
        shared, shares, *regions = inputs
        maps, weights = self._flat(shared, shares), self._weights(regions[0] if regions else shares)
        weights = ops.transpose(weights, (0, 2, 1))
        mean, square = ops.matmul(weights, maps), ops.matmul(weights, maps * maps)
        # the root's slope is infinite at 0
        moments = ops.concatenate([mean, ops.sqrt(ops.maximum(square - mean * mean, 1e-6))], axis=-1)
        return ops.reshape(moments, (-1, moments.shape[1] * moments.shape[2]))

    def compute_output_shape(self, input_shape):
        maps, *shares = input_shape
        return (maps[0], 2 * shares[-1][-1] * maps[-1])

    def write_onnx(self, g, shared, shares, regions=None):
        maps, weights = self._flat_onnx(g, shared, shares), self._weights_onnx(g, regions or shares)
        weights = g.node("Transpose", [weights], perm=[0, 2, 1])

        def average(x):  # (N, C, HW) -> (N, R, C)
            return g.node("Transpose", [g.node("MatMul", [x, weights])], perm=[0, 2, 1])

        mean = average(maps)
        variance = g.node("Sub", [average(g.node("Mul", [maps, maps])), g.node("Mul", [mean, mean])])
        deviation = g.node("Sqrt", [g.node("Max", [variance, g.constant(1e-6)])])
        return g.node("Flatten", [g.node("Concat", [mean, deviation], axis=2)])


@keras.saving.register_keras_serializable("blastoscope")
class MaskedCovariance(_MaskedPooling):
    """-> (N, C (C + 1) / 2): which maps go together over the cell, as signed square roots.

    Texture, whatever its place: Lin, RoyChowdhury and Maji 2015, arXiv:1504.07889; of few mixed maps, Gao et al. 2016,
    arXiv:1511.06062.
    """

    _SMOOTH = 1e-4  # the root's slope is infinite at 0

    def call(self, inputs):
        maps, weights = self._flat(*inputs), self._weights(inputs[1])
        gap = maps - ops.sum(maps * weights, axis=1, keepdims=True)
        covariance = ops.matmul(ops.transpose(gap * weights, (0, 2, 1)), gap)
        channels = maps.shape[-1]
        upper = ops.take(ops.reshape(covariance, (-1, channels * channels)), self._upper(channels), axis=1)
        return upper / ops.sqrt(ops.abs(upper) + self._SMOOTH)

    @staticmethod
    def _upper(channels: int) -> np.ndarray:
        rows, columns = np.triu_indices(channels)
        return rows * channels + columns

    def compute_output_shape(self, input_shape):
        channels = input_shape[0][-1]
        return (input_shape[0][0], channels * (channels + 1) // 2)

    def write_onnx(self, g, shared, shares):
        maps, weights = self._flat_onnx(g, shared, shares), self._weights_onnx(g, shares)
        mean = g.node("ReduceSum", [g.node("Mul", [maps, weights]), g.constant([2], "int64")], keepdims=1)
        gap = g.node("Sub", [maps, mean])
        covariance = g.node("MatMul", [g.node("Mul", [gap, weights]), g.node("Transpose", [gap], perm=[0, 2, 1])])
        channels = self.input[0].shape[-1]
        upper = g.node("Gather", [g.node("Flatten", [covariance]), g.constant(self._upper(channels), "int64")], axis=1)
        root = g.node("Sqrt", [g.node("Add", [g.node("Abs", [upper]), g.constant(self._SMOOTH)])])
        return g.node("Div", [upper, root])


def mix_maps(maps, name: str):
    """Random mixtures of the maps, each of about their size."""
    start = keras.initializers.RandomNormal(stddev=maps.shape[-1] ** -0.5, seed=len(name))
    return layers.Conv2D(_MIXTURES, 1, use_bias=False, kernel_initializer=start, name=name)(maps)


def cell_shares(inside, maps, stride: int, name: str):
    """(N, S, S, R) masks -> (N, h, w, R): how much of each place of `maps`, `stride` pixels apart, is cell, or a part of it.

    Convolutions without padding lose places at the rim, and so does the result.
    """
    shares = layers.AveragePooling2D(stride, padding="same", name=f"{name}_shares")(inside)
    lost = shares.shape[1] - maps.shape[1]
    rim = (lost // 2, lost - lost // 2)
    return layers.Cropping2D((rim, rim), name=f"{name}_rim")(shares) if lost else shares


def read_pooled(cell, *kinds, name: str) -> keras.Model:
    """The network that reads pooled features, each kind a list of (N, D) tensors by its name, by one logit.

    A recipe's `probe` sets the logit: a regression for each kind, averaged.
    """
    joined = [layers.Concatenate(name=kind)(tensors) for kind, tensors in kinds]
    # one kind must not look like several: a concatenation before the embedding is read as kinds
    x = (
        layers.Concatenate(name="features")(joined)
        if len(joined) > 1
        else layers.Activation("linear", name="features")(joined[0])
    )
    x = layers.BatchNormalization(name="embedding", center=False, scale=False, dtype="float32")(x)
    return keras.Model(cell, one_logit(x), name=name)
