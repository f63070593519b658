"""Growing EfficientNetB3 out of an ImageNet MobileNetV2: both are inverted residual blocks, so one can start as the other.

Net2Net (Chen et al. 2016, arXiv:1511.05641) copies a small network into a larger one exactly. Here the larger one has another
activation (swish), gates and 5 x 5 kernels, so what cannot be copied is fitted, block by block, on cells without their labels:
convolutions by ridge regression to what MobileNetV2 has at the same place. docs/decisions/0011.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from model_zoo import find_architecture
from training.augment import augmentation
from training.errors import RecipeError
from training.recipe import Recipe

# MobileNetV2's blocks of each of EfficientNetB3's seven stages; strides and order are the same.
_STAGES = {
    "block1": ("expanded_conv",),
    "block2": ("block_1", "block_2"),
    "block3": ("block_3", "block_4", "block_5"),
    "block4": ("block_6", "block_7", "block_8", "block_9"),
    "block5": ("block_10", "block_11", "block_12"),
    "block6": ("block_13", "block_14", "block_15"),
    "block7": ("block_16",),
}
_SHARPNESS = 6.0  # swish(6 x) / 6 is nearly relu(x)
_OPEN = 4.0  # bias of a gate: sigmoid(4) = .98, nearly open, and free to learn
_RIDGE = 1e-4  # of the mean variance
_CELLS, _FEWEST, _SIZE = 1000, 300, 96  # so many cells of 96 px; of larger ones fewer: places count, and there are more
_BATCH = 50
_BLACK = 0.05  # weight of a place off the cell, beside 1 on it


def grow(
    network, recipe: Recipe, packed: np.ndarray, rows: np.ndarray, *, pause: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Set the EfficientNetB3 inside `network` to compute what the MobileNetV2 of `recipe.grow_from` does.

    Args:
        network: holds Keras' EfficientNetB3 under Keras' names, or its first layers, from the expansion of block 6a on.
        recipe: its augmentation is applied to the cells looked at: what is to be fitted is known of any picture, so the fit
            may as well hold for other stains than the training subjects'. Its seed chooses them, and what MobileNetV2 has no
            counterpart for.
        packed, rows: uint8 (n, S, S, 3), and the positions whose pictures may be looked at.
        pause: called between batches; may raise.
    Returns:
        Stage -> correlation of its output with MobileNetV2's over the cells' places, mean over channels.
    Raises:
        RecipeError: `network` holds none. WeightsError: no such file, or not of MobileNetV2.
    """
    if not {"stem_conv", "block6a_expand_conv"} <= {layer.name for layer in network.layers}:
        raise RecipeError(f"Only an EfficientNetB3 can be grown from MobileNetV2. Received: {network.name}")
    rng = np.random.default_rng(recipe.seed)
    enough = int(np.clip(_CELLS * (_SIZE / packed.shape[1]) ** 2, _FEWEST, _CELLS))
    chosen = np.sort(rng.choice(rows, min(enough, len(rows)), replace=False))
    layers, seen = augmentation(recipe), []
    for i in range(0, len(chosen), _BATCH):
        cells = packed[chosen[i : i + _BATCH]]
        for layer in layers:
            cells = layer(cells, training=True)
        seen.append(ops.convert_to_numpy(cells).astype("float32"))
    return _Growth(network, recipe.grow_from, np.concatenate(seen), rng, pause).run()


class _Growth:
    """Two streams of maps of the same cells, `old` in MobileNetV2 and `new` in the network that grows, at the same depth."""

    def __init__(self, network, weights: str, cells: np.ndarray, rng, pause: Callable[[], None]):
        self.network, self.rng, self.pause = network, rng, pause
        self.teacher = find_architecture("mobilenet_v2").build(input_size=cells.shape[1], weights=weights)
        self.names, self.old_names = ([layer.name for layer in net.layers] for net in (network, self.teacher))
        self.old = self.new = cells
        self.inside = (self.old.max(-1, keepdims=True) >= 1).astype("float32")
        self.at_old = self.teacher.inputs[0]
        self.at_new = self._layer("efficientnet_rescaling_1").input  # behind what turns and restains the cell
        self.copied = np.arange(3)  # channel of `new` -> the channel of `old` that it is to equal

    def run(self) -> dict[str, float]:
        told = {}
        self._stem()
        for stage, blocks in _STAGES.items():
            own = {name[:7]: None for name in self.names if name.startswith(stage)}  # block4a, block4b, ... in order
            for i, name in enumerate(own):
                if not self._block(name, blocks[i] if i < len(blocks) else None):
                    return told
            told[stage] = self._agreement()
        before, self.copied = self._old("Conv_1_bn"), self._widened(1280, self._layer("top_conv").filters)
        self._fit("top_conv", "top_bn", lambda new: new, lambda old, new: _SHARPNESS * before(old)[..., self.copied])
        return told

    def _stem(self) -> None:
        """3 x 3 x 3 -> 40 of 32: as a regression on patches, whatever scaling comes before."""
        conv = self._layer("stem_conv")
        padded, before = _between(self.at_new, conv.input), self._old("bn_Conv1")

        def patches(new):
            return ops.convert_to_numpy(ops.image.extract_patches(padded(new), (3, 3), strides=2, padding="valid"))

        self.copied = self._widened(32, conv.filters)
        self._fit("stem_conv", "stem_bn", patches, lambda old, new: _SHARPNESS * before(old)[..., self.copied])
        self._advance("Conv1_relu", "stem_activation")

    def _block(self, name: str, block: str | None) -> bool:
        """One block as MobileNetV2's `block`; without one, of random features that mend what the last ones left wrong.

        Returns:
            Whether the network has the whole block.
        """
        expands = f"{name}_expand_conv" in self.names  # the first stage's do not
        spread = self._expand(name, block) if expands else self.copied
        if f"{name}_project_conv" not in self.names:
            return False
        self._depthwise(name, block, spread)
        reduce, opened = self._layer(f"{name}_se_reduce"), self._layer(f"{name}_se_expand")
        opened.set_weights([np.zeros(opened.kernel.shape), np.full(opened.filters, _OPEN)])
        reduce.bias.assign(np.zeros(reduce.filters))

        conv = self._layer(f"{name}_project_conv")
        residual = f"{name}_add" in self.names
        if block:
            last = next(layer for layer in (f"{block}_add", f"{block}_project_BN") if layer in self.old_names)
            output = self._old(last)
        else:
            last, output = None, lambda old: old
        if not residual:
            self.copied = self._widened(int(output(self.old[:1]).shape[-1]), conv.filters)
        copied = self.copied

        def missing(old, new):
            wanted = output(old)[..., copied]
            return wanted - new if residual else wanted

        self._fit(f"{name}_project_conv", f"{name}_project_bn", self._new(f"{name}_se_excite"), missing)
        self._advance(last, f"{name}_add" if residual else f"{name}_project_bn")
        return True

    def _expand(self, name: str, block: str | None) -> np.ndarray:
        conv, bn = self._layer(f"{name}_expand_conv"), self._layer(f"{name}_expand_bn")
        if not block:
            kernel = self.rng.normal(size=(self.new.shape[-1], conv.filters))
            mean, covariance, *_ = self._moments(lambda new: new, lambda old, new: new[..., :1])
            kernel /= np.sqrt(np.einsum("ij,ik,kj->j", kernel, covariance, kernel) + 1e-9)
            shift = self.rng.uniform(-1, 1, conv.filters) - mean @ kernel
            self._set(conv, bn, _SHARPNESS * kernel, _SHARPNESS * shift, mean, covariance)
            return np.arange(conv.filters)
        before = self._old(f"{block}_expand_BN")
        channels = self._layer(f"{block}_expand_BN", self.teacher).moving_mean.shape[0]
        copied = self._widened(channels, conv.filters)
        shift = np.where(np.arange(conv.filters) < channels, 0, self.rng.uniform(-1, 1, conv.filters)).astype("float32")

        def wanted(old, new):
            return _SHARPNESS * (before(old)[..., copied] + shift)  # copies begin elsewhere: new features

        self._fit(f"{name}_expand_conv", f"{name}_expand_bn", lambda new: new, wanted)
        return copied

    def _depthwise(self, name: str, block: str | None, copied: np.ndarray) -> None:
        conv, bn = self._layer(f"{name}_dwconv"), self._layer(f"{name}_bn")
        size, channels = conv.kernel_size[0], len(copied)
        kernel = np.zeros((size, size, channels, 1), "float32")
        if block:
            theirs = keras.ops.convert_to_numpy(self._layer(f"{block}_depthwise", self.teacher).kernel)
            rim = (size - 3) // 2
            kernel[rim : rim + 3, rim : rim + 3] = theirs[:, :, copied]
        else:
            kernel[:] = 0.3 * self.rng.normal(size=kernel.shape)
            kernel[size // 2, size // 2] += 1
        conv.set_weights([kernel])
        found, target = self._new(f"{name}_dwconv"), self._old(f"{block}_depthwise_BN") if block else None
        totals = np.zeros((5, channels))  # of weight, x, x x, y, x y
        for old, new, weight in self._batches():
            x = found(new).astype("float64")
            y = target(old)[..., copied].astype("float64") if block else x
            weight = self._weights(weight, x.shape[1])
            totals += [(term * weight).sum((0, 1, 2)) for term in (np.ones_like(x), x, x * x, y, x * y)]
        mean, square, level, product = totals[1:] / totals[0]
        variance = np.maximum(square - mean**2, 1e-12)
        if block:  # the straight line from what it gives to what MobileNetV2 has
            slope = np.maximum((product - mean * level) / variance, 0)
            middle = level
        else:
            slope, middle = 1 / np.sqrt(variance), self.rng.uniform(-1, 1, channels)
        gamma = _SHARPNESS * slope * np.sqrt(variance + bn.epsilon)
        bn.set_weights([gamma, _SHARPNESS * middle, mean, variance])

    # --- tools ---

    def _fit(self, conv: str, bn: str, features, wanted) -> None:
        """Set a convolution and its batch norm to the ridge regression from `features(new)` to `wanted(old, new)`."""
        mean, covariance, level, product = self._moments(features, wanted)
        penalty = _RIDGE * np.trace(covariance) / len(covariance) + 1e-9
        kernel = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), product)
        self._set(self._layer(conv), self._layer(bn), kernel, level - mean @ kernel, mean, covariance)

    def _set(self, conv, bn, kernel, bias, mean, covariance) -> None:
        """conv(x) = x @ kernel, bn(conv(x)) = conv(x) + bias, with the batch norm's statistics what they are on these cells."""
        conv.set_weights([kernel.reshape(conv.kernel.shape)])
        variance = np.maximum(np.einsum("ij,ik,kj->j", kernel, covariance, kernel), 0)
        bn.set_weights([np.sqrt(variance + bn.epsilon), mean @ kernel + bias, mean @ kernel, variance])

    def _moments(self, features, wanted) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean and covariance of `features(new)` over the places, and of `wanted(old, new)` mean and covariance with them."""
        gram, cross = 0.0, 0.0
        for old, new, weight in self._batches():
            x, y = features(new), wanted(old, new)
            root = np.sqrt(self._weights(weight, x.shape[1])).reshape(-1, 1)
            x = np.concatenate([x, np.ones_like(x[..., :1])], axis=-1).reshape(len(root), -1) * root
            x = x.astype("float64")
            gram, cross = gram + x.T @ x, cross + x.T @ (y.reshape(len(root), -1) * root)
        gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]
        mean, level = gram[-1, :-1], cross[-1]
        return mean, gram[:-1, :-1] - np.outer(mean, mean), level, cross[:-1] - np.outer(mean, level)

    def _batches(self):
        for i in range(0, len(self.old), _BATCH):
            self.pause()
            yield self.old[i : i + _BATCH], self.new[i : i + _BATCH], self.inside[i : i + _BATCH]

    @staticmethod
    def _weights(inside, size: int) -> np.ndarray:
        """(B, size, size, 1): how much a place counts."""
        stride = -(-inside.shape[1] // size)
        return _BLACK + ops.convert_to_numpy(ops.average_pool(inside, stride, strides=stride, padding="same"))

    def _advance(self, old: str | None, new: str) -> None:
        """Take both streams to behind these layers."""
        if old:
            self.old = self._through(self._old(old), self.old)
            self.at_old = self._layer(old, self.teacher).output
        self.new = self._through(self._new(new), self.new)
        self.at_new = self._layer(new).output

    @staticmethod
    def _through(part, maps) -> np.ndarray:
        return np.concatenate([part(maps[i : i + _BATCH]) for i in range(0, len(maps), _BATCH)])

    def _agreement(self) -> float:
        weight = self._weights(self.inside, self.old.shape[1]) - _BLACK
        weight = weight / weight.sum()

        def standard(x):
            gap = x - (x * weight).sum((0, 1, 2))
            return gap / np.sqrt((gap * gap * weight).sum((0, 1, 2)) + 1e-12)

        return float((standard(self.old[..., self.copied]) * standard(self.new) * weight).sum((0, 1, 2)).mean())

    def _widened(self, channels: int, wider: int) -> np.ndarray:
        """For each of `wider` channels, which of `channels` it copies: each once, then some again."""
        return np.concatenate([np.arange(channels), self.rng.choice(channels, wider - channels, replace=wider > 2 * channels)])

    def _old(self, name: str):
        """From where the old stream is to behind that layer: arrays (B, h, w, C) in and out."""
        return _between(self.at_old, self._layer(name, self.teacher).output)

    def _new(self, name: str):
        return _between(self.at_new, self._layer(name).output)

    def _layer(self, name: str, network=None):
        return (network or self.network).get_layer(name)


def _between(start, end):
    part = keras.Model(start, end)
    return lambda maps: ops.convert_to_numpy(part(maps))
