"""Keras <-> ONNX: a checkpoint's weights are an ONNX graph that the app runs without TensorFlow.

Why not a converter library: docs/decisions/0002. The graph keeps Keras' layer names as tensor names, so that any
layer's activation can be read out, and Keras' own weight layouts (rounded to float16), so that the same file
fills a Keras model again. The runtime folds the casts and transposes when it loads the file.

Where the weights are larger than what a Git host takes, they lie in several files beside the graph, as ONNX external
data: model.onnx, model.0.bin, model.1.bin, ... They are one set: `weights_files` names it, `hash_weights` covers it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from model_zoo._checkpoint import weights_files
from model_zoo._errors import CheckpointError

OPSET = 17
SHARD_BYTES = 90_000_000
_CONSTANT = "const/"  # initializers that are no Keras weights
_PIECE = "@"  # "fc1/kernel@0.3": piece 3 of a weight larger than a file may be, cut along axis 0


def write_onnx(model, path: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a flat functional Keras model (NHWC) with layers `embedding` and `logit` as ONNX (NCHW inside).

    Input `cells` uint8 (N, S, S, 3); outputs `logit` (N, 1), `embedding` (N, D). Weight matrices and kernels are
    stored in float16, vectors in float32 (batch-norm variances leave float16's range).

    Args:
        shard_bytes: weights of more bytes altogether go into `weights_files(path)[1:]`, none of them larger than this.
    Raises:
        CheckpointError: a layer type without a rule below, or a weight that is not finite in float16.
    """
    graph = _Graph(shard_bytes)
    table = []
    for layer in model.layers:
        kind = type(layer).__name__
        sources = layer.input if isinstance(layer.input, list) else [layer.input]
        graph.layer = layer
        inputs = [] if kind == "InputLayer" else [graph.tensors[id(s)] for s in sources]
        if kind in _RULES:
            output = _RULES[kind](graph, layer, *inputs)
        elif hasattr(layer, "write_onnx"):  # an architecture's own layers bring theirs
            output = layer.write_onnx(graph, *inputs)
        else:
            raise CheckpointError(f"Layer {layer.name!r} of type {kind} has no ONNX rule; add one in model_zoo/_onnx.py.")
        graph.node("Identity", [output], output=layer.name)
        graph.tensors[id(layer.output)] = layer.name
        table.append(
            {
                "name": layer.name,
                "kind": kind,
                "shape": list(layer.output.shape[1:]),
                "parameters": int(layer.count_params()),
                "inputs": inputs,
            }
        )
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", model.get_layer(name).output.shape[-1]])
        for name in ("logit", "embedding")
    ]
    size = model.inputs[0].shape[1:]
    cell = helper.make_tensor_value_info("cells", TensorProto.UINT8, ["N", *size])
    built = helper.make_model(
        helper.make_graph(graph.nodes, model.name, [cell], outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="blastoscope",
    )
    helper.set_model_props(built, {"layers": json.dumps(table)})
    onnx.checker.check_model(built)
    _write_shards(built.graph.initializer, path, shard_bytes)
    onnx.save(built, str(path))


def _write_shards(tensors, path: Path, shard_bytes: int) -> None:
    """Move the bytes of `tensors` into files beside `path`, if they are too many for it."""
    for shard in weights_files(path)[1:]:  # of an earlier writing
        shard.unlink()
    if sum(len(t.raw_data) for t in tensors) <= shard_bytes:
        return
    number, size = 0, 0
    for tensor in tensors:
        data = tensor.raw_data
        if len(data) < 1024:  # the checker and the runtime's shape inference look into small constants
            continue
        if size and size + len(data) > shard_bytes:
            number, size = number + 1, 0
        shard = path.with_name(f"{path.stem}.{number}.bin")
        with shard.open("ab") as file:
            file.write(data)
        set_external_data(tensor, shard.name, offset=size, length=len(data))
        tensor.ClearField("raw_data")
        size += len(data)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """`layer/variable` -> float32 array in Keras' layout.

    Raises:
        CheckpointError: a file of the set is missing or cut short.
    """
    try:
        stored = onnx.load(str(path)).graph.initializer
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read whole: {error}. Restore the folder or train again.") from error
    pieces = {}
    for tensor in stored:
        if not tensor.name.startswith(_CONSTANT):
            name, _, piece = tensor.name.partition(_PIECE)
            axis = int(piece.partition(".")[0] or 0)
            pieces.setdefault((name, axis), []).append(numpy_helper.to_array(tensor).astype("float32"))
    return {name: p[0] if len(p) == 1 else np.concatenate(p, axis) for (name, axis), p in pieces.items()}


def fill_model(model, path: Path) -> None:
    """Set every weight of `model` from the file.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    from model_zoo._architecture import refresh  # imports Keras, which whoever has a model has done

    stored = read_weights(path)
    for layer in model.layers:
        for variable in layer.weights:
            if variable.name == "count":  # Normalization's sample counter: no part of the function
                continue
            name = f"{layer.name}/{variable.name}"
            value = stored.pop(name, None)
            if value is None or value.shape != tuple(variable.shape):
                found = "nothing" if value is None else f"shape {value.shape}"
                raise CheckpointError(f"{path}: {name} should have shape {tuple(variable.shape)}, the file holds {found}.")
            variable.assign(value)
    refresh(model.layers)
    if stored:
        raise CheckpointError(f"{path} holds weights the architecture does not have: {', '.join(sorted(stored)[:3])} …")


class _Graph:
    """Nodes and initializers in the making. 4-D tensors are NCHW here, 2-D ones as in Keras."""

    def __init__(self, shard_bytes: int):
        self.nodes, self.initializers, self.tensors, self.layer = [], [], {}, None
        self._shard_bytes = shard_bytes

    def node(self, op, inputs, output=None, **attributes) -> str:
        output = output or f"{self.layer.name}/{op}:{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value, dtype="float32") -> str:
        name = f"{_CONSTANT}{self.layer.name}:{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, variable) -> str:
        """A Keras variable as a float32 tensor in Keras' layout."""
        name = f"{self.layer.name}/{variable.name}"
        value = np.asarray(variable.numpy(), "float32")
        half = value.astype("float16") if value.ndim >= 2 else value
        if not np.isfinite(half).all():
            raise CheckpointError(f"Weight {name} is not finite in float16; the training diverged.")
        stored = self._store(half, name)
        return self.node("Cast", [stored], to=TensorProto.FLOAT) if value.ndim >= 2 else stored

    def _store(self, value, name: str) -> str:
        if value.nbytes <= self._shard_bytes:
            self.initializers.append(numpy_helper.from_array(value, name))
            return name
        axis = int(np.argmax(value.shape))
        rows = max(1, self._shard_bytes * value.shape[axis] // value.nbytes)
        pieces = np.split(value, range(rows, value.shape[axis], rows), axis)
        names = [f"{name}{_PIECE}{axis}.{i}" for i in range(len(pieces))]
        self.initializers += [numpy_helper.from_array(p, n) for p, n in zip(pieces, names, strict=True)]
        return self.node("Concat", names, axis=axis)

    def per_channel(self, value) -> str:
        return self.constant(np.asarray(value, "float32").reshape(1, -1, 1, 1))

    def activate(self, x, activation) -> str:
        name = activation if isinstance(activation, str) else activation.__name__
        match name:
            case "linear":
                return x
            case "relu" | "sigmoid" | "softmax" | "tanh" | "elu":
                return self.node(name.capitalize(), [x])
            case "relu6":
                return self.node("Clip", [x, self.constant(0.0), self.constant(6.0)])
            case "silu" | "swish":
                return self.node("Mul", [x, self.node("Sigmoid", [x])])
        raise CheckpointError(f"Activation {name!r} of layer {self.layer.name!r} has no ONNX rule.")


def _input(g, layer):
    return g.node("Transpose", [g.node("Cast", ["cells"], to=TensorProto.FLOAT)], perm=[0, 3, 1, 2])


def _rescaling(g, layer, x):
    return g.node("Add", [g.node("Mul", [x, g.per_channel(layer.scale)]), g.per_channel(layer.offset)])


def _normalization(g, layer, x):
    if layer.weights:  # learnt from data: variables, in Keras' layout
        mean, variance = (g.node("Reshape", [g.weight(w), g.constant([1, -1, 1, 1], "int64")]) for w in layer.weights[:2])
        deviation = g.node("Max", [g.node("Sqrt", [variance]), g.constant(1e-7)])
    else:
        mean = g.per_channel(layer.mean)
        deviation = g.constant(np.maximum(np.sqrt(np.asarray(layer.variance, "float32")), 1e-7).reshape(1, -1, 1, 1))
    return g.node("Div", [g.node("Sub", [x, mean]), deviation])


def _pad(g, layer, x):
    (top, bottom), (left, right) = layer.padding
    return g.node("Pad", [x, g.constant([0, 0, top, left, 0, 0, bottom, right], "int64")])


def _crop(g, layer, x):
    (top, bottom), (left, right) = layer.cropping
    height, width = layer.input.shape[1:3]
    ends = g.constant([height - bottom, width - right], "int64")
    return g.node("Slice", [x, g.constant([top, left], "int64"), ends, g.constant([2, 3], "int64")])


def _window(layer, size) -> dict:
    """Keras' 'same' is ONNX's SAME_UPPER: the odd pixel goes to the bottom and right."""
    return {
        "kernel_shape": list(size),
        "strides": list(layer.strides),
        "auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[layer.padding],
    }


def _conv(g, layer, x):
    kernel = g.node("Transpose", [g.weight(layer.kernel)], perm=[3, 2, 0, 1])
    bias = [g.weight(layer.bias)] if layer.use_bias else []
    window = _window(layer, layer.kernel_size) | {"dilations": list(layer.dilation_rate), "group": layer.groups}
    return g.activate(g.node("Conv", [x, kernel, *bias], **window), layer.activation)


def _depthwise(g, layer, x):
    h, w, channels, multiplier = layer.kernel.shape
    kernel = g.node("Transpose", [g.weight(layer.kernel)], perm=[2, 3, 0, 1])
    kernel = g.node("Reshape", [kernel, g.constant([channels * multiplier, 1, h, w], "int64")])
    bias = [g.weight(layer.bias)] if layer.use_bias else []
    window = _window(layer, layer.kernel_size) | {"dilations": list(layer.dilation_rate), "group": channels}
    return g.activate(g.node("Conv", [x, kernel, *bias], **window), layer.activation)


def _batch_norm(g, layer, x):
    n = layer.moving_mean.shape[0]
    gamma = g.weight(layer.gamma) if layer.scale else g.constant(np.ones(n))
    beta = g.weight(layer.beta) if layer.center else g.constant(np.zeros(n))
    statistics = [g.weight(layer.moving_mean), g.weight(layer.moving_variance)]
    return g.node("BatchNormalization", [x, gamma, beta, *statistics], epsilon=float(layer.epsilon))


def _relu(g, layer, x):
    if layer.negative_slope or layer.threshold:
        raise CheckpointError(f"ReLU {layer.name!r}: only max_value has an ONNX rule.")
    top = [] if layer.max_value is None else [g.constant(layer.max_value)]
    return g.node("Clip", [x, g.constant(0.0), *top])


def _pool(op, **extra):
    return lambda g, layer, x: g.node(op, [x], **_window(layer, layer.pool_size), **extra)


def _global_pool(op):
    def rule(g, layer, x):
        pooled = g.node(op, [x])
        return pooled if layer.keepdims else g.node("Flatten", [pooled])

    return rule


def _reshape(g, layer, x):
    if len(layer.output.shape) != 4 or layer.output.shape[1:3] != (1, 1):
        raise CheckpointError(f"Reshape {layer.name!r} to {layer.output.shape[1:]}: only (1, 1, C) has an ONNX rule.")
    return g.node("Reshape", [x, g.constant([0, layer.output.shape[-1], 1, 1], "int64")])


def _flatten(g, layer, x):
    if len(layer.input.shape) == 4:
        x = g.node("Transpose", [x], perm=[0, 2, 3, 1])
    return g.node("Flatten", [x])


def _dense(g, layer, x):
    bias = [g.weight(layer.bias)] if layer.use_bias else []
    return g.activate(g.node("Gemm", [x, g.weight(layer.kernel), *bias]), layer.activation)


def _concatenate(g, layer, *xs):
    if layer.axis not in (-1, len(layer.output.shape) - 1):
        raise CheckpointError(f"Concatenate {layer.name!r}: only the channel axis has an ONNX rule.")
    return g.node("Concat", list(xs), axis=1)


def _sum_or_product(op):
    def rule(g, layer, *xs):
        total = xs[0]
        for x in xs[1:]:
            total = g.node(op, [total, x])
        return total

    return rule


_RULES = {
    "InputLayer": _input,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "ZeroPadding2D": _pad,
    "Cropping2D": _crop,
    "Conv2D": _conv,
    "GroupedConv2D": _conv,
    "DepthwiseConv2D": _depthwise,
    "BatchNormalization": _batch_norm,
    "Activation": lambda g, layer, x: g.activate(x, layer.activation),
    "ReLU": _relu,
    "Softmax": lambda g, layer, x: g.node("Softmax", [x], axis=-1),
    "MaxPooling2D": _pool("MaxPool"),
    "AveragePooling2D": _pool("AveragePool", count_include_pad=0),
    "GlobalAveragePooling2D": _global_pool("GlobalAveragePool"),
    "GlobalMaxPooling2D": _global_pool("GlobalMaxPool"),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Dense": _dense,
    "Dropout": lambda g, layer, x: x,
    "Concatenate": _concatenate,
    "Add": _sum_or_product("Add"),
    "Multiply": _sum_or_product("Mul"),
}
