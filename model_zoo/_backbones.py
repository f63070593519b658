"""Keras' ImageNet networks without their tops, as parts of our flat graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
from keras import layers

from model_zoo._architecture import MOMENTUM, name_by_position, start

# Deviation of ImageNet's pixels: a standardised picture times this has the range a backbone was made for.
_DEVIATION = 57.6


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One of keras.applications.

    Attributes:
        make: the function of keras.applications.
        prefix: begins the names of layers that Keras would number by what was built before.
        mean, unit: it was made for (RGB - mean) / unit of raw 0..255; None where that is inside of it.
        bgr_layer: first convolution, where Keras' weights expect the channels in the order BGR. The graph stays in
            RGB; `start` reverses the kernel instead.
        momentum: of its batch norms.
    """

    make: Callable[..., keras.Model]
    prefix: str = ""
    mean: tuple[float, ...] | None = None
    unit: float = 1.0
    bgr_layer: str = ""
    momentum: float = MOMENTUM

    def rescale(self, cell, name: str = "rescale"):
        """Raw RGB 0..255 -> the range its ImageNet weights were made for."""
        return layers.Rescaling(1 / self.unit, [-m / self.unit for m in self.mean], name=name)(cell)

    def rescale_standardised(self, x, name: str):
        """Zero mean and unit deviation -> that range."""
        return layers.Rescaling(_DEVIATION / self.unit, name=name)(x)

    def on(self, x, **options) -> keras.Model:
        """The backbone with random weights, built on a tensor."""
        return self._make(weights=None, input_tensor=x, **options)

    def averaged(self, head, *, name: str, standardised: bool = False, input_size: int, weights: str | None = None):
        """The whole network: the backbone, its maps' average, `head`; `standardised` as by paper 003. See `Architecture`."""
        cell = keras.Input((input_size, input_size, 3), name="cell")
        if standardised:
            x = self.rescale_standardised(layers.Normalization(name="standardise")(cell), "rescale")
        else:
            x = self.rescale(cell)
        x = layers.GlobalAveragePooling2D(name="embedding")(self.on(x).output)
        model = keras.Model(cell, head(x), name=name)
        self.start(model, weights)
        return model

    def start(self, model: keras.Model, weights: str | None, *, prefix: str = "") -> None:
        """Give the backbone inside `model` its initial weights; see `model_zoo._architecture.start`."""
        start(
            model,
            weights,
            prefix=prefix,
            bare=lambda: self._make(weights=None, input_shape=(224, 224, 3)),
            imagenet=lambda: self._make(weights="imagenet", input_shape=(224, 224, 3)),
        )
        if weights and self.bgr_layer:
            first = model.get_layer(prefix + self.bgr_layer)
            kernel, *rest = first.get_weights()
            first.set_weights([kernel[:, :, ::-1], *rest])

    def _make(self, **options) -> keras.Model:
        backbone = self.make(include_top=False, **options)
        if self.prefix:
            name_by_position(backbone.layers, self.prefix)
        for layer in backbone.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.momentum = self.momentum
        return backbone


_CAFFE = {"mean": (123.68, 116.779, 103.939)}
VGG16 = Backbone(make=keras.applications.VGG16, bgr_layer="block1_conv1", **_CAFFE)
RESNET50 = Backbone(make=keras.applications.ResNet50, bgr_layer="conv1_conv", **_CAFFE)
INCEPTION_V3 = Backbone(make=keras.applications.InceptionV3, prefix="inception", mean=(127.5,) * 3, unit=127.5)
MOBILENET_V2 = Backbone(make=keras.applications.MobileNetV2, mean=(127.5,) * 3, unit=127.5, momentum=0.9)
EFFICIENTNET_B3 = Backbone(make=keras.applications.EfficientNetB3, prefix="efficientnet")
