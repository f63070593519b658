"""Is this one segmented cell on black, as the networks were trained on? Where not, say why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLACK = 12  # brightest channel value that still counts as background: leaves room for JPEG noise
_USUAL_FILL = 0.92  # of the box around a cell; 0.86 at most among 5,981 C-NMC cells
# Faint pixels for each pixel of the cell's rim: 0.98 at most among those; from 2.1 on in lossy WebP and JPEG, but for JPEG of
# quality 100 with its colours in full, which leaves hardly any.
_FAINT = 1.5
# What is measured of each cell: its diameter in pixels at native scale, and of its mean colour the optical density (mean of the
# three channels), and the red's and the blue's share of it.
MEASURES = ("diameter_px", "darkness", "red", "blue")
_COLOUR = ("of another colour than", "of an unusual colour", "another stain, lamp or white balance")
# Below and above what a network knows: what is said of one cell, of a person's cells, and why it may be.
_UNLIKE = {
    ("diameter_px", -1): (
        "diameter {:.0f} px, smaller than",
        "unusually small (median diameter {:.0f} px)",
        "another magnification",
    ),
    ("diameter_px", 1): (
        "diameter {:.0f} px, larger than",
        "unusually large (median diameter {:.0f} px)",
        "another magnification",
    ),
    ("darkness", -1): ("paler than", "unusually pale", "another stain or lamp"),
    ("darkness", 1): ("darker than", "unusually dark", "another stain or lamp"),
    **{(name, side): _COLOUR for name in ("red", "blue") for side in (-1, 1)},
}


@dataclass(frozen=True, kw_only=True)
class CellQuality:
    """Verdict on one image.

    Attributes:
        kind: "cell", "unusual" (scored, with reasons) or "refused".
        box: (top, bottom, left, right), half-open, of the mask; of the whole image when there is no mask.
        reasons: sentences; empty for an ordinary cell.
        measures: the values of MEASURES; () where nothing could be measured.
    """

    kind: str
    box: tuple[int, int, int, int]
    reasons: tuple[str, ...]
    measures: tuple[float, ...] = ()


def cell_mask(image: np.ndarray) -> np.ndarray:
    """bool (H, W): the largest connected region brighter than the black background; all False when there is none.

    Args:
        image: uint8 (H, W, 3).
    """
    regions, sizes = _regions(image)
    return regions == 1 + sizes.argmax() if len(sizes) else regions.astype(bool)


def cell_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open bounding box (top, bottom, left, right) of the cell's mask; of the whole image when there is none."""
    return _box(*_regions(image))


def inspect_cell(image: np.ndarray) -> CellQuality:
    """Judge whether an image shows one segmented cell on black, whatever network is to read it.

    Args:
        image: uint8 (H, W, 3).
    """
    regions, sizes = _regions(image)
    box = _box(regions, sizes)
    if not len(sizes) or sizes.max() < 300:
        sentence = "there is no cell on the black background."
        return CellQuality(kind="refused", box=box, reasons=(sentence,))
    edges = [regions[0], regions[-1], regions[:, 0], regions[:, -1]]
    edge_share = float(np.concatenate(edges).astype(bool).mean())
    if edge_share > 0.25:
        sentence = (
            "the background is not black, so this is no segmented cell. "
            "Cut out single cells and set everything outside the cell to black."
        )
        return CellQuality(kind="refused", box=box, reasons=(sentence,))
    top, bottom, left, right = box
    if sizes.max() > _USUAL_FILL * (bottom - top) * (right - left):
        sentence = "a picture with straight sides, not a cell cut out along its outline. Cut out single cells on black."
        return CellQuality(kind="refused", box=box, reasons=(sentence,))
    reasons = []
    if edge_share > 0:
        reasons.append("the cell is cut off at the image's edge")
    if np.sort(sizes)[-2:-1].sum() > 0.25 * sizes.max():
        reasons.append("more than one object; only the largest was read as the cell")
    measures = (float(np.sqrt(4 * sizes.max() / np.pi)), *_stain(image))
    return CellQuality(kind="unusual" if reasons else "cell", box=box, reasons=tuple(reasons), measures=measures)


def describe_unlike(measures, usual: dict | None) -> list[str]:
    """Sentences on how a cell's MEASURES differ from what a network knows, `training.data.usual_ranges`; else none."""
    return [f"{how} the training cells: {why}?" for how, why in unlike(measures, usual, "cell")]


def unlike(measures, usual: dict | None, of: str) -> list[tuple[str, str]]:
    """How MEASURES differ from what a network knows `of` a "cell", or, of medians, of a "person"; and why it may be."""
    ranges = [usual[name][of] if usual else (-np.inf, np.inf) for name in MEASURES]
    found = zip(MEASURES, measures, ranges, strict=True)
    outside = [_UNLIKE[name, 1 if value > high else -1] for name, value, (low, high) in found if not low <= value <= high]
    # red and blue are one colour
    return [((cell if of == "cell" else person).format(measures[0]), why) for cell, person, why in dict.fromkeys(outside)]


def _stain(image: np.ndarray) -> tuple[float, float, float]:
    """Darkness, red and blue of what is not black, as MEASURES says."""
    colour = image[_brightest(image) > 0].mean(axis=0)
    density = -np.log10((colour + 1) / 256)
    total = max(float(density.sum()), 1e-6)  # none where all is white
    return float(density.mean()), float(density[0] / total), float(density[2] / total)


def blacken(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """Make the background black again where lossy compression left faint traces on it, which networks would read as cell.

    Told by the traces, not by the file's format: a JPEG that was saved again as PNG has them too.

    Args:
        image: uint8 (H, W, 3).
    Returns:
        The image, a copy where it was changed, and whether it was.
    """
    brightest = _brightest(image)
    faint = (brightest > 0) & (brightest <= BLACK)
    if faint.sum() <= _FAINT * np.sqrt(4 * np.pi * (brightest > BLACK).sum()):
        return image, False
    image = image.copy()
    image[faint] = 0
    return image, True


def _brightest(image: np.ndarray) -> np.ndarray:
    """Largest channel, uint8 (H, W); image.max(axis=2) takes 17 times as long."""
    return np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])


def _regions(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected regions: int (H, W), 0 = background, and their sizes in pixels."""
    from scipy import ndimage  # here: it takes a sixth of a second that the first screen need not wait for

    regions, count = ndimage.label(_brightest(image) > BLACK)
    return regions, np.bincount(regions.ravel(), minlength=count + 1)[1:]


def _box(regions: np.ndarray, sizes: np.ndarray) -> tuple[int, int, int, int]:
    if not len(sizes):
        return 0, regions.shape[0], 0, regions.shape[1]
    mask = regions == 1 + sizes.argmax()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
