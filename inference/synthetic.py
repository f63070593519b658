"""Demo cells drawn from statistics of C-NMC cells: no real cell enters the project.

A cell is one vector of LAYOUT. Per class it is Gaussian: class mean + subject effect +
cell effect, fitted by `training/synthesis.py` into `synthetic_cells.npz`. Outline and
chromatin are random-phase: white noise given the drawn power spectrum (Galerne, Gousseau
and Morel 2011, IEEE TIP 20(1):257-267, doi 10.1109/TIP.2010.2052822).
"""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import fft, ndimage, special

SIDE = 450  # pixels, the side of a C-NMC crop
ANGLES = 512  # samples of an outline
HARMONICS = np.array([2, 3, 4, 5, 7, 10, 15, 24, 40, 80])  # outline bands: [2, 3), [3, 4) ... [40, 80)
EFFECTS = 12  # directions in which subjects differ
FARTHEST = 145  # pixels from the centre, where the outlines stop
FINE = 10  # harmonic from which roughness comes in bursts
DEPTHS = np.array([1, 2, 3, 4, 6, 8, 11, 15, 20, 28])  # pixels from the edge, rim profile
FREQUENCIES = np.array([0.008, 0.016, 0.026, 0.04, 0.06, 0.09, 0.13, 0.19, 0.28, 0.5])  # cycles a pixel
NO_CRESCENT = 0.004  # share of the area added before the logarithm
CYTOPLASM = 0.5  # log green above the nucleus, from which a pixel counts as cytoplasm
_SIZES = {
    "radius": 1,  # log radius of the disc of equal area, pixels
    "outline": len(HARMONICS) - 1,  # log power of log r(angle) by band
    "bursts": 1,  # log kurtosis of the fine outline: how local its roughness is
    "colour": 3,  # mean log(1 + RGB)
    "rim": 3 * len(DEPTHS),  # colour at each depth minus mean colour
    "crescent": 1,  # log share of the area that is pale cytoplasm
    "cytoplasm": 3,  # its colour minus mean colour
    "skew": 3,  # skewness of the texture by channel
    "texture": 6 * (len(FREQUENCIES) - 1),  # log-Cholesky of the RGB cross-spectrum by band
}
_ENDS = np.cumsum(list(_SIZES.values()))
LAYOUT = {name: slice(end - size, end) for (name, size), end in zip(_SIZES.items(), _ENDS, strict=True)}
DIMENSION = int(_ENDS[-1])


def demo_patients():
    """Three patients as uploads, the same on every call: {patient: [(file name, PNG bytes)]}."""
    plan = {"A": ("all", 62, 5), "B": ("hem", 57, 18), "C": ("mixed", 40, 10)}
    patients = {}
    for letter, (label, n, seed) in plan.items():
        name = f"Demo patient {letter} (synthetic)"
        patients[name] = synthetic_patient(label, n=n, seed=seed, patient=name)
    return patients


def synthetic_patient(label, *, n, seed, patient="Demo patient (synthetic)", fitted=None):
    """Draw n cells of one subject.

    Args:
        label: "all", "hem", or "mixed" (half ALL, half healthy, shuffled).
        n: cells.
        seed: int; the same seed gives the same bytes.
        patient: folder name.
        fitted: as for `synthetic_cell`.
    Returns:
        list of (file name, PNG bytes) as an upload gives them.
    Raises:
        ValueError: unknown label.
    """
    rng = np.random.default_rng(seed)
    subject = draw_subject(rng)
    labels = rng.permutation((["all", "hem"] * n)[:n]) if label == "mixed" else [label] * n
    cells = []
    for i, each in enumerate(labels, start=1):
        cell, buffer = synthetic_cell(each, rng, subject=subject, fitted=fitted), io.BytesIO()
        # compress_type 3, run lengths: smaller and quicker here.
        Image.fromarray(cell).save(buffer, "PNG", compress_level=1, compress_type=3)
        cells.append((f"{patient}/cell {i:03d}.png", buffer.getvalue()))
    return cells


def synthetic_cell(label, rng, *, subject=None, fitted=None):
    """Draw one cell.

    Args:
        label: "all" or "hem".
        rng: numpy Generator.
        subject: from `draw_subject`, shared by the cells of a patient; None draws a new one.
        fitted: parameters as `training.synthesis.fit` returns them; None reads the bundled file.
    Returns:
        uint8 (450, 450, 3), one component centred on exact black.
    Raises:
        ValueError: unknown label.
    """
    if label not in ("all", "hem"):
        raise ValueError(f'label must be "all" or "hem". Received: label={label!r}')
    fitted = fitted or _load()
    subject = draw_subject(rng) if subject is None else subject
    scores = np.clip(rng.standard_normal(DIMENSION), -2, 2)
    vector = fitted[f"{label}_mean"] + fitted["subject"] @ subject + fitted[f"{label}_cell"] @ scores
    roughest = fitted[f"{label}_roughest"]
    vector[LAYOUT["outline"]] = np.minimum(vector[LAYOUT["outline"]], roughest)
    return render(vector, rng)


def draw_subject(rng):
    """Draw a subject's departure from its class (stain, brightness, size): float (EFFECTS,) standard scores."""
    return np.clip(rng.standard_normal(EFFECTS), -1.8, 1.8)


def render(vector, rng):
    """Draw a cell with the statistics float (DIMENSION,) of LAYOUT: uint8 (450, 450, 3)."""
    part = {name: vector[where] for name, where in LAYOUT.items()}
    radius, inside, mask, y, x = _draw_outline(part, rng)
    depth = ndimage.distance_transform_edt(mask)[mask].astype(int)
    rim = part["rim"].reshape(-1, 3).T
    profile = np.stack([np.interp(np.arange(FARTHEST + 2), DEPTHS + 0.5, channel) for channel in rim])
    colour = _texture(mask, part, rng) + (profile + part["colour"][:, None]).astype(np.float32)[:, depth]
    share = np.exp(part["crescent"][0]) - NO_CRESCENT
    if share > 0.01:
        pale = _crescent(share, radius, y, x, rng)
        mean = np.float32(part["colour"])[:, None]
        colour += pale * (np.float32(part["cytoplasm"])[:, None] + 0.7 * (mean - colour))
    light = np.expm1(colour) * np.minimum(inside, 1)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = len(mask) // 2
    where = slice(SIDE // 2 - half, SIDE // 2 + half)
    image[where, where][mask] = light.clip(1, 255).T
    return image


def _draw_outline(part, rng):
    """Outline (ANGLES,), mask about its centroid, and of the mask's pixels: margin to the outline, y, x."""
    radius = np.exp(part["radius"][0] + _wave(part, rng))
    ray = np.exp(2j * np.pi * np.arange(ANGLES) / ANGLES)
    centroid = (radius**3 * ray).sum() * 2 / 3 / (radius**2).sum()
    reach = np.abs(radius * ray - centroid).max()
    radius, centroid = (each * min(1, FARTHEST / reach) for each in (radius, centroid))
    half = int(min(reach, FARTHEST)) + 2
    y, x = np.mgrid[-half:half, -half:half].astype(np.float32)
    y, x = y + np.float32(centroid.imag), x + np.float32(centroid.real)
    inside = _inside(radius, y, x)
    parts, _ = ndimage.label(inside > 0)
    mask = parts == parts.flat[np.argmax(inside)]
    return radius, inside[mask], mask, y[mask], x[mask]


def _wave(part, rng):
    """Log radius over angle (ANGLES,): random phases, the fine part gathered in bursts."""
    k = np.arange(ANGLES // 2 + 1)
    band = np.searchsorted(HARMONICS, k, side="right") - 1
    amplitude = np.concatenate([np.exp(part["outline"] / 2), [0]])[band]  # 0 beyond both ends
    noise = amplitude * np.exp(2j * np.pi * rng.random(len(k))) * ANGLES
    bursts = ndimage.gaussian_filter1d(rng.standard_normal(ANGLES), 9, mode="wrap")
    bursts = (bursts - bursts.mean()) / bursts.std()
    # A log-normal envelope of log spread s multiplies the kurtosis, 3 without it, by exp(4 s^2).
    spread = np.sqrt(max(part["bursts"][0] - np.log(3), 0)) / 2
    envelope = np.exp(spread * bursts - spread**2)
    return fft.irfft(noise * (k < FINE), ANGLES) + envelope * fft.irfft(noise * (k >= FINE), ANGLES)


def _inside(radius, y, x):
    """Pixels from (y, x) outwards to the outline along the ray: positive inside."""
    angle = np.arctan2(y, x) * (ANGLES / (2 * np.pi))
    return radius[np.round(angle).astype(int) % ANGLES] - np.hypot(y, x)


def _crescent(share, radius, y, x, rng):
    """Weight of cytoplasm: the nucleus is a smaller copy pushed towards one side."""
    small = np.sqrt(1 - min(share, 0.25))
    push = (1 - small) * radius.mean() * rng.uniform(0.5, 1.2)
    angle = rng.uniform(0, 2 * np.pi)
    wobble = ndimage.gaussian_filter1d(rng.standard_normal(ANGLES), 20, mode="wrap") * 0.1
    nucleus = small * ndimage.gaussian_filter1d(radius, 8, mode="wrap") * (1 + wobble)
    margin = _inside(nucleus, y - push * np.sin(angle), x - push * np.cos(angle))
    return special.expit(-margin / 2)


def _texture(mask, part, rng):
    """Gaussian field (3, pixels of mask) with the drawn cross-spectrum, bent to the drawn skewness."""
    size = fft.next_fast_len(len(mask), real=True)
    f = np.hypot(fft.fftfreq(size)[:, None], fft.rfftfreq(size)).astype(np.float32)
    level = np.linspace(0, 0.75, 512)
    middle = np.log(np.sqrt(FREQUENCIES[:-1] * FREQUENCIES[1:]))
    bands = part["texture"].reshape(-1, 6)
    table = np.stack([np.interp(np.log(level + 1e-6), middle, band) for band in bands.T]).astype(np.float32)
    table[:3] = np.exp(table[:3])
    table[:, 0] = 0
    red, green, blue, green_red, blue_red, blue_green = table[:, (f * (511 / 0.75) + 0.5).astype(int)]
    a, b, c = fft.rfft2(rng.standard_normal((3, size, size), np.float32))
    a, b, c = red * a, green * b, blue * c
    spectrum = np.stack([a, green_red * a + b, blue_red * a + blue_green * b + c])
    field = fft.irfft2(spectrum, (size, size))[:, : len(mask), : len(mask)][:, mask]
    spread = field.std(axis=1, keepdims=True)
    bend = np.float32(np.clip(part["skew"] / 3, -0.1, 0.5) + 1e-3)[:, None]  # skewness of a log-normal is about 3 a
    return (np.exp(bend * field / spread) - np.exp(bend**2 / 2)) / bend * spread * np.exp(-0.75 * bend**2)


@functools.cache
def _load():
    with np.load(Path(__file__).with_name("synthetic_cells.npz"), allow_pickle=False) as file:
        fitted = dict(file)
    for array in fitted.values():
        array.flags.writeable = False
    return fitted
