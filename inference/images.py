"""Decode, and frame a cell for a network: the ONE preprocessing of serving and training."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from inference.errors import ImageError
from inference.gate import blacken, cell_box
from model_zoo import FrameSpec

MAX_PIXELS = 25_000_000  # as many cells are decoded at once as there are cores
FORMATS = ("BMP", "PNG", "WEBP", "JPEG", "TIFF", "GIF", "PPM")
SUFFIXES = {
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
}
LOSSY = "lossy compression: what it left on the black background was removed; PNG or BMP are read more surely"
# Of what `decode_image` says, what takes nothing from P(ALL).
HARMLESS = re.compile(rf"{re.escape(LOSSY)}|the content is \w+, whatever the name says|only the first of \d+ frames was read")
_CNMC_NAME = re.compile(r"^UID_(?P<subject>h?\d+)_(?P<image>\d+)_(?P<cell>\d+)_(?P<label>all|hem)$", re.IGNORECASE)

warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; what matters is raised
Image.MAX_IMAGE_PIXELS = None  # our own limit is tested on the header, before any pixel is decoded


def decode_image(data: bytes, *, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode one image file to 8-bit RGB.

    Transparent pixels and what lossy compression left on the background become black, as around a segmented cell. EXIF
    orientation is applied.

    Returns:
        uint8 (H, W, 3), and sentences on what had to be converted (empty for ordinary RGB).
    Raises:
        ImageError: empty, no image, truncated, unsupported, or more than 25 megapixels.
    """
    if not data:
        raise ImageError(name, "the file is empty (0 bytes). Copy it again from its source.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                name,
                f"{width} × {height} pixels is over the limit of {MAX_PIXELS // 1_000_000} megapixels. "
                "Crop the single cells first.",
            )
        notes = tuple(_describe(image, name))
        pixels, cleaned = blacken(_to_rgb(image, name))
        return pixels, (*notes, *[LOSSY] * cleaned)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, "not an image this program reads. Save it as BMP, PNG, WebP, JPEG or TIFF.") from None
    except Exception as error:  # a decoder meets hostile bytes: each library raises its own kinds
        raise ImageError(name, f"the image is damaged or truncated ({type(error).__name__}). Copy it again.") from None


def _describe(image: Image.Image, name: str):
    suffix = PurePosixPath(name).suffix.lower()
    if suffix and image.format != SUFFIXES.get(suffix, suffix[1:].upper()):
        yield f"the content is {image.format}, whatever the name says"
    if getattr(image, "n_frames", 1) > 1:
        yield f"only the first of {image.n_frames} frames was read"
    if image.mode.startswith(("I", "F")):
        yield "16-bit or floating-point grey was reduced to 8 bits"
    if image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "F"):
        yield "grey image: the networks were trained on stained colour images"
    if image.mode == "CMYK":
        yield "CMYK colours were converted to RGB"


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype("float32")
        if not np.isfinite(grey).all():
            raise ValueError("not finite")
        brightest = grey.max(initial=0)
        if 255 < brightest < 16384:
            raise ImageError(
                name, f"its values reach only {brightest:,.0f} of 65,535. Save it as 8-bit RGB, at full brightness."
            )
        grey = grey / 257 if brightest > 255 else grey
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        cell = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", cell.size, (0, 0, 0, 255)), cell)
    return np.asarray(image.convert("RGB"))


def crop_cell(image: np.ndarray, crop: int, *, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Cut a `crop` × `crop` window centred on the cell's mask, at native scale, black where the image ends.

    Args:
        image: uint8 (H, W, 3), one cell on black.
        crop: pixels.
        box: the mask's, where `inspect_cell` has already found it.
    Returns:
        uint8 (crop, crop, 3).
    """
    top, bottom, left, right = box or cell_box(image)
    y, x = (top + bottom - crop) // 2, (left + right - crop) // 2
    out = np.zeros((crop, crop, 3), "uint8")
    y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + crop, image.shape[0]), min(x + crop, image.shape[1])
    out[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    return out


def cell_hash(image: np.ndarray, *, box: tuple[int, int, int, int]) -> str:
    """What tells a cell's picture again: 16 hexadecimal digits, BLAKE2 of the pixels in its box.

    The same in any lossless format, under any name and with more or less black around the cell; another after any change of
    a pixel, as by JPEG, turning or scaling.

    Args:
        image: uint8 (H, W, 3), one cell on black.
        box: of the cell's mask, as `inspect_cell` finds it.
    """
    top, bottom, left, right = box
    inside = image[top:bottom, left:right]
    return hashlib.blake2b(f"{inside.shape}".encode() + inside.tobytes(), digest_size=8).hexdigest()


def frame_cell(image: np.ndarray, spec: FrameSpec, *, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Frame one cell for a network: centred crop at native scale, then one antialiased resize.

    A cell is never rescaled to fill the frame: its size is a diagnostic sign.

    Args:
        image: uint8 (H, W, 3).
        spec: crop and size in pixels.
        box: the mask's, where `inspect_cell` has already found it.
    Returns:
        uint8 (size, size, 3).
    """
    return resize_cells(crop_cell(image, spec.crop, box=box)[None], spec.size)[0]


def resize_cells(windows: np.ndarray, size: int) -> np.ndarray:
    """The one antialiased resize: uint8 (N, crop, crop, 3) -> (N, size, size, 3)."""
    if size == windows.shape[1]:
        return windows
    resized = np.empty((len(windows), size, size, 3), "uint8")
    for i, window in enumerate(windows):
        resized[i] = np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.BILINEAR))
    return resized


def rotate_cells(cells: np.ndarray, turns: int) -> np.ndarray:
    """Turn framed cells about the middle by `turns` times 45 degrees, counterclockwise.

    Quarter turns move pixels and change none; the others are bilinear. What comes in from outside is black.

    Args:
        cells: uint8 (N, S, S, 3).
        turns: any integer; 8 are a full circle.
    Returns:
        uint8 (N, S, S, 3), contiguous.
    """
    if turns % 2:
        turned = np.empty_like(cells)
        for i, cell in enumerate(cells):
            turned[i] = np.asarray(Image.fromarray(cell).rotate(45, Image.Resampling.BILINEAR))
        cells = turned
    return np.ascontiguousarray(np.rot90(cells, turns // 2, axes=(1, 2)))


def subject_of(name: str) -> str | None:
    """Subject id from a C-NMC file name (`UID_h3_12_5_hem.bmp` -> `H3`), None for any other name."""
    match = _CNMC_NAME.match(PurePosixPath(name).stem)
    return match["subject"].upper() if match else None


def clean_name(name: str) -> str:
    """A file name or path as it may be shown: no control or direction marks, one line, at most 200 characters.

    Folders are shortened without regard to the file, and both with a hash: what lies in one folder stays together, and apart
    from what lies in another, and so do names.
    """
    text = unicodedata.normalize("NFC", name.replace("\\", "/"))
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    text = " ".join(text.split()) or "unnamed"
    folder, slash, file = text.rpartition("/")
    return f"{_shorten(folder, 70, 40)}{slash}{_shorten(file, 41, 28)}"


def _shorten(text: str, first: int, last: int) -> str:
    """At most first + 10 + last characters: its two ends, and between them what keeps it apart from others like it."""
    if len(text) <= first + 10 + last:
        return text
    return f"{text[:first]}…{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}…{text[-last:]}"


def patient_of(name: str) -> str:
    """The patient a path belongs to: the C-NMC subject, else its folders, else "unnamed patient".

    All of them: `Anna/cells` and `Berta/cells` are two patients.
    """
    path = PurePosixPath(clean_name(name))
    folders = [part for part in path.parts[:-1] if part not in ("/", ".", "..")]
    return subject_of(path.name) or " / ".join(folders) or "unnamed patient"
