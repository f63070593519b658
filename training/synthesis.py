"""Fit the statistics from which `inference/synthetic.py` draws the demo cells.

Data: C-NMC 2019, Gupta & Gupta, The Cancer Imaging Archive, doi 10.7937/tcia.2019.dc64i46r, CC BY 3.0.

python -m training.synthesis ../shared/data/cnmc -o inference/synthetic_cells.npz
"""

import argparse
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from inference.synthetic import (
    ANGLES,
    CYTOPLASM,
    DEPTHS,
    EFFECTS,
    FINE,
    FREQUENCIES,
    HARMONICS,
    LAYOUT,
    NO_CRESCENT,
    synthetic_cell,
)

ENOUGH = 10  # cells for a subject to count in the between-subject covariance
WINDOW = 256  # pixels, side of the transform that measures the texture


def describe_cell(image):
    """Measure one cell: uint8 (H, W, 3) on exact black -> float (DIMENSION,) in the order of LAYOUT."""
    mask = ndimage.binary_fill_holes(image.any(-1))
    mask, image = _crop(mask, mask), _crop(image, mask)
    depth = ndimage.distance_transform_edt(mask)
    log = np.log1p(image.astype(float))
    outline, bursts = _describe_outline(mask)

    cytoplasm, nucleus = _split(log, mask, depth)

    colour = log[nucleus & (depth > 8)].mean(0)
    ring = np.clip(np.searchsorted(DEPTHS, depth, side="left") - 1, -1, None)
    rings = [log[nucleus & (ring == i)] for i in range(len(DEPTHS))]
    rim = np.array([pixels.mean(0) - colour if len(pixels) else [np.nan] * 3 for pixels in rings])
    residual = np.where(nucleus[..., None], log - colour - rim[ring], 0)
    inner = residual[nucleus & (depth > 4)]
    skew = (inner**3).mean(0) / (inner**2).mean(0) ** 1.5
    measured = {
        "radius": np.log(mask.sum() / np.pi) / 2,
        "outline": outline,
        "bursts": bursts,
        "colour": colour,
        "rim": rim,
        "crescent": np.log(cytoplasm.sum() / mask.sum() + NO_CRESCENT),
        "cytoplasm": log[cytoplasm & (depth > 3)].mean(0) - colour if cytoplasm[depth > 3].mean() > 0.02 else [np.nan] * 3,
        "skew": skew,
        "texture": _describe_texture(residual, nucleus),
    }
    return np.concatenate([np.ravel(measured[name]) for name in LAYOUT])


def _split(log, mask, depth):
    """Masks of cytoplasm (pale, touching the edge, as blue as the nucleus or bluer) and of nucleus."""
    share = ndimage.gaussian_filter(mask.astype(float), 2)
    smooth = ndimage.gaussian_filter(log[..., 1], 2) / np.maximum(share, 0.1)
    pale = ndimage.binary_opening(mask & (smooth > np.median(log[mask][:, 1]) + CYTOPLASM), iterations=3)
    regions, _ = ndimage.label(pale)
    outside = np.isin(regions, np.unique(regions[pale & (depth < 4)]))
    nucleus = mask & ~ndimage.binary_dilation(outside, iterations=3)
    hue = log[..., 2] - log[..., 0]
    return outside & (hue > np.median(hue[nucleus]) - 0.1), nucleus  # pale and pink is a red cell


def _crop(array, mask):
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    widths = [(1, 1), (1, 1)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array[rows, columns], widths)


def _describe_outline(mask):
    """Log power of the log radius by band, and log kurtosis of its fine part."""
    cy, cx = ndimage.center_of_mass(mask)
    angle = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    steps = np.arange(0, max(mask.shape), 0.5)
    y, x = cy + steps[:, None] * np.sin(angle), cx + steps[:, None] * np.cos(angle)
    radius = ndimage.map_coordinates(mask.astype(np.float32), [y, x], order=1).sum(0) * 0.5
    harmonics = fft.rfft(np.log(radius.clip(5))) / ANGLES
    power = np.abs(harmonics) ** 2
    bands = [np.log(power[a:b].mean() + 1e-12) for a, b in pairwise(HARMONICS)]
    harmonics[:FINE] = 0
    fine = fft.irfft(harmonics, ANGLES)
    return bands, np.log((fine**4).mean() / (fine**2).mean() ** 2)


def _describe_texture(residual, nucleus):
    """Log-Cholesky (bands, 6) of the RGB cross-spectrum in the largest disc inside the nucleus."""
    room = ndimage.distance_transform_edt(nucleus)
    cy, cx = np.unravel_index(room.argmax(), room.shape)
    reach = min(room.max(), WINDOW // 2 - 1)
    y, x = np.ogrid[: len(residual), : residual.shape[1]]
    weight = np.cos(np.pi / 2 * np.minimum(np.hypot(y - cy, x - cx) / reach, 1)) ** 2
    mean = (residual * weight[..., None]).sum((0, 1)) / weight.sum()
    spectrum = fft.rfft2((residual - mean) * weight[..., None], (WINDOW * 2, WINDOW * 2), axes=(0, 1))
    f = np.hypot(fft.fftfreq(WINDOW * 2)[:, None], fft.rfftfreq(WINDOW * 2))
    bands = []
    for a, b in pairwise(FREQUENCIES):
        values = spectrum[(f >= a) & (f < b)]
        power = (values.T @ values.conj()).real / len(values) / (weight**2).sum()
        lower = np.linalg.cholesky(power + 1e-9 * np.eye(3))
        scale = np.diag(lower)
        unit = lower / scale
        bands.append([*np.log(scale), unit[1, 0], unit[2, 0], unit[2, 1]])
    return np.array(bands)


def typical(vectors, *, keep):
    """Which cells lie nearest the median: bool (n_cells,). Drops debris, neighbours and cut cells."""
    middle = np.nanmedian(vectors, axis=0)
    score = np.abs(vectors - middle) / np.nanmedian(np.abs(vectors - middle), axis=0)
    score = np.minimum(score, 10)
    odd = np.nanmean(score, axis=1) + score[:, LAYOUT["outline"]].mean(1)
    return odd <= np.quantile(odd, keep)


def fit(vectors, labels, subjects):
    """Fit class mean + subject effect + cell effect.

    Args:
        vectors: float (n_cells, DIMENSION); NaN where a cell lacks the feature.
        labels, subjects: str (n_cells,).
    Returns:
        dict of float32 arrays, the content of `synthetic_cells.npz`.
    """
    rng = np.random.default_rng(0)
    fitted, departures, noise = {}, [], []
    for label in ("all", "hem"):
        x, owners = vectors[labels == label].copy(), subjects[labels == label]
        x = np.clip(x, *np.nanpercentile(x, [1, 99], axis=0))
        for column in x.T:  # a feature that a cell lacks is drawn from the cells that have it
            lacking = np.isnan(column)
            column[lacking] = rng.choice(column[~lacking], lacking.sum())
        means = {owner: x[owners == owner].mean(0) for owner in np.unique(owners)}
        fitted[f"{label}_mean"] = np.mean(list(means.values()), axis=0)
        within = np.cov(x - [means[owner] for owner in owners], rowvar=False)
        fitted[f"{label}_cell"] = _square_root(within)
        # Log power has a long upper tail of odd cells, which a Gaussian would make of any cell.
        fitted[f"{label}_roughest"] = np.percentile(x[:, LAYOUT["outline"]], 85, axis=0)
        for owner, mean in means.items():
            if (n := (owners == owner).sum()) >= ENOUGH:
                departures.append(mean - fitted[f"{label}_mean"])
                noise.append(within / n)
    # Subjects of both classes share one stain: too few for one covariance a class.
    between = np.cov(departures, rowvar=False) - np.mean(noise, axis=0)
    spread = np.sqrt(np.mean(noise, axis=0).diagonal())
    fitted["subject"] = spread[:, None] * _square_root(between / np.outer(spread, spread))[:, -EFFECTS:]
    return {name: array.astype(np.float32) for name, array in fitted.items()}


def calibrate(fitted, vectors, labels, *, rounds=3, n=100):
    """Shift means and shrink cell effects until described synthetic cells agree with real ones.

    The method of simulated moments (McFadden 1989, Econometrica 57:995-1026): measuring a
    cell is biased (few periods of a slow wave, masks, clipping), and adds noise of its own.
    """
    rng = np.random.default_rng(0)
    for label in ("all", "hem"):
        real = vectors[labels == label]
        for _ in range(rounds):
            drawn = np.array([describe_cell(synthetic_cell(label, rng, fitted=fitted)) for _ in range(n)])
            fitted[f"{label}_mean"] += np.nan_to_num(np.nanmedian(real, axis=0) - np.nanmedian(drawn, axis=0))
            # Only shrinks: what measuring adds is to go, what the renderer's limits take away is not to return.
            fitted[f"{label}_cell"] *= np.nan_to_num(_spread(real) / _spread(drawn), nan=1).clip(0.7, 1)[:, None]


def _spread(vectors):
    return np.nanstd(np.clip(vectors, *np.nanpercentile(vectors, [2, 98], axis=0)), axis=0)


def _square_root(covariance):
    values, directions = np.linalg.eigh(covariance)
    return directions * np.sqrt(values.clip(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of UID_<subject>_<image>_<cell>_<label>.* files, at any depth")
    parser.add_argument("-o", "--output", type=Path, required=True, help="parameter file (.npz)")
    parser.add_argument("--per-subject", type=int, default=60, help="cells drawn of a subject, at most")
    parser.add_argument("--keep", type=float, default=0.75, help="share of each class kept, the most typical cells")
    arguments = parser.parse_args()

    files = defaultdict(list)
    for path in sorted(arguments.data.rglob("UID_*")):
        fields = path.stem.split("_")
        files[fields[-1].lower(), fields[1].upper()].append(path)
    if {label for label, _ in files} != {"all", "hem"}:
        parser.error(f"no cells of both classes. Received: data={str(arguments.data)!r}")
    rng = np.random.default_rng(0)
    rows = []
    for (label, subject), paths in files.items():
        for i in rng.permutation(len(paths))[: arguments.per_subject]:
            rows.append((describe_cell(np.asarray(Image.open(paths[i]).convert("RGB"))), label, subject))
    vectors, labels, subjects = map(np.array, zip(*rows, strict=True))
    keep = np.zeros(len(labels), bool)
    for label in ("all", "hem"):
        keep[labels == label] = typical(vectors[labels == label], keep=arguments.keep)
    vectors, labels, subjects = vectors[keep], labels[keep], subjects[keep]
    fitted = fit(vectors, labels, subjects)
    calibrate(fitted, vectors, labels)
    np.savez_compressed(arguments.output, **fitted)
    for label in ("all", "hem"):
        print(f"{label}: {(labels == label).sum()} cells of {len(set(subjects[labels == label]))} subjects")
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
