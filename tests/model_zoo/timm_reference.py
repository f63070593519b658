"""Is our SE-ResNeXt50 timm's? And: ImageNet weights for it. A development script; needs torch and timm besides Keras.

    KERAS_BACKEND=torch PYTHONPATH=. python tests/model_zoo/timm_reference.py check
    KERAS_BACKEND=torch PYTHONPATH=. python tests/model_zoo/timm_reference.py convert seresnext50_32x4d.weights.h5

`check` gives both networks the same derived weights, compares their logits, and stores timm's beside this file for the
test that runs without torch. `convert` downloads timm's ImageNet weights (or takes a file, `--timm FILE`, of its state
dict) and writes the backbone's, which `weights` of a recipe can name.
"""

import argparse
import sys
import zlib
from pathlib import Path

import keras
import numpy as np

REFERENCE = Path(__file__).with_suffix(".npz")
SIZE = 96
_TIMM_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def derived_cells() -> np.ndarray:
    """uint8 (2, SIZE, SIZE, 3), the same everywhere."""
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype="uint8")


def derived_weight(layer: str, variable: str, shape) -> np.ndarray:
    """A random weight that depends on its name and shape alone; of a size that keeps activations near one."""
    rng = np.random.default_rng(zlib.crc32(f"{layer}/{variable}".encode()))
    match variable:
        case "kernel":
            return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype("float32")
        case "gamma":
            return rng.uniform(0.3, 0.7, shape).astype("float32")
        case "moving_variance":
            return rng.uniform(0.5, 1.5, shape).astype("float32")
    return rng.normal(0, 0.1, shape).astype("float32")


def fill_with_derived(model: keras.Model) -> None:
    for layer in model.layers:
        layer.set_weights([derived_weight(layer.name, v.name, tuple(v.shape)) for v in layer.weights])


def from_timm(layer: keras.layers.Layer, state: dict) -> list[np.ndarray]:
    """The weights of one of our layers out of timm's state dict: kernels are (O, I, h, w) there, (h, w, I, O) here."""
    arrays = []
    for variable in layer.weights:
        value = np.asarray(state[f"{layer.name.replace('_', '.')}.{_TIMM_NAMES[variable.name]}"], "float32")
        arrays.append(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
    return arrays


def check() -> int:
    import timm
    import torch

    from model_zoo.se_resnext50 import build_classifier

    ours, theirs = build_classifier(input_size=SIZE), timm.create_model("seresnext50_32x4d", pretrained=False).eval()
    state = theirs.state_dict()
    for layer in ours.layers:
        for variable in layer.weights:
            value = derived_weight(layer.name, variable.name, tuple(variable.shape))
            name = f"{layer.name.replace('_', '.')}.{_TIMM_NAMES[variable.name]}"
            state[name] = torch.from_numpy(np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T))
    theirs.load_state_dict(state)
    for layer in ours.layers:
        layer.set_weights(from_timm(layer, theirs.state_dict()))
    cells = derived_cells().astype("float32")
    mean, deviation = (np.array(theirs.pretrained_cfg[key], "float32") for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(((cells / 255 - mean) / deviation).transpose(0, 3, 1, 2).copy())).numpy()
        found = keras.ops.convert_to_numpy(ours(cells, training=False))
    count = sum(p.numel() for p in theirs.parameters())
    print(f"timm {timm.__version__}: {count:,} parameters; ours {sum(v.value.numel() for v in ours.trainable_variables):,}")
    print(f"logits within {np.abs(expected).max():.3g}; largest difference {np.abs(found - expected).max():.2g}")
    np.savez_compressed(REFERENCE, logits=expected)
    return int(np.abs(found - expected).max() > 1e-4)


def convert(out: Path, file: Path | None) -> int:
    import timm
    import torch

    from model_zoo.se_resnext50 import build_backbone

    if file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    else:
        state = timm.create_model("seresnext50_32x4d", pretrained=True).state_dict()
    backbone = build_backbone(input_size=224)
    for layer in backbone.layers:
        layer.set_weights(from_timm(layer, state))
    backbone.save_weights(out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    converting = commands.add_parser("convert")
    converting.add_argument("out", type=Path)
    converting.add_argument("--timm", type=Path)
    options = parser.parse_args()
    sys.exit(check() if options.command == "check" else convert(options.out, options.timm))
