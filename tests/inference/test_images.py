import io
import re
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from inference.errors import ImageError, InputError
from inference.gate import cell_box, cell_mask, inspect_cell
from inference.images import (
    LOSSY,
    cell_hash,
    clean_name,
    crop_cell,
    decode_image,
    frame_cell,
    patient_of,
    rotate_cells,
    subject_of,
)
from model_zoo import FrameSpec

LOSSLESS = ("BMP", "PNG", "WEBP", "TIFF")
SUFFIX = {"BMP": ".bmp", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "JPEG": ".jpg", "GIF": ".gif", "PPM": ".ppm"}
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def small(draw_cell):
    return draw_cell(canvas=(60, 50), axes=(40, 30))


def refusal(data, name="cells/odd file.png"):
    with pytest.raises(InputError) as caught:
        decode_image(data, name=name)
    assert caught.value.sentence.strip() and name in str(caught.value)
    return caught.value.sentence


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_decode_to_the_drawn_pixels(form, draw_cell, encode):
    image, notes = decode_image(encode(draw_cell(), form), name="cell" + SUFFIX[form])
    assert image.dtype == np.uint8 and (image == draw_cell()).all() and notes == ()


LOSS = {"JPEG": {"subsampling": 2}, "WEBP": {"lossless": False}}


@pytest.mark.parametrize("quality", [75, 95, 100])
@pytest.mark.parametrize("form", LOSS)
def test_lossy_compression_leaves_nothing_on_the_background(form, quality, real_cells, encode):
    """Networks take every pixel that is not black for cell."""
    for file in real_cells(6):
        cell, _ = decode_image(file.read_bytes(), name=file.name)
        image, notes = decode_image(encode(cell, form, quality=quality, **LOSS[form]), name="cell" + SUFFIX[form])
        assert notes == (LOSSY,)
        assert np.abs(image.astype(int) - cell).mean() < 3
        assert np.abs(np.subtract(cell_box(image), cell_box(cell))).max() <= 2
        outside = ~ndimage.binary_dilation(cell_mask(cell), iterations=8)
        assert image[outside].max(-1).mean() < 0.05
        again, told = decode_image(encode(image, "PNG"), name="cell.png")  # saved again without loss
        assert np.array_equal(again, image) and told == ()


def test_what_jpeg_left_is_found_in_a_png_too(real_cells, encode):
    cell, _ = decode_image(real_cells(1)[0].read_bytes(), name="cell")
    traces = np.asarray(Image.open(io.BytesIO(encode(cell, "JPEG", quality=95))))
    image, notes = decode_image(encode(traces, "PNG"), name="cell.png")
    assert notes == (LOSSY,) and (image.max(-1) > 0).sum() < (traces.max(-1) > 0).sum()


def test_lossless_cells_are_read_as_they_are(real_cells):
    for file in real_cells(60):
        image, notes = decode_image(file.read_bytes(), name=file.name)
        assert notes == () and np.array_equal(image, np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("form", ["GIF", "PPM"])
def test_other_formats_are_read_under_their_own_name(form, small, encode):
    image, notes = decode_image(encode(small, form), name="cell" + SUFFIX[form])
    assert image.shape == small.shape and notes == ()


@pytest.mark.parametrize("name", ["cell.bmp", "cell.txt"])
def test_wrong_extension_is_read_by_content_and_noted(name, small, encode):
    image, notes = decode_image(encode(small, "PNG"), name=name)
    assert (image == small).all() and len(notes) == 1 and "PNG" in notes[0]


@pytest.mark.parametrize("data", [b"", b"\0" * 5000, b"Patient 7, 12 June", b"%PDF-1.7\n", b"BM", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    refusal(data)


def test_empty_file_says_so():
    assert "empty" in refusal(b"")


@pytest.mark.parametrize("form", [*LOSSLESS, "JPEG", "GIF"])
@given(data=st.data())
@few
def test_truncated_file_is_refused_or_whole(form, data, small, encode):
    """A file may miss its trailer; it must never come back with other pixels than it was saved with."""
    whole = encode(small, form)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        image, _ = decode_image(cut, name="cut")
    except ImageError as error:
        assert error.sentence and "cut" in str(error)
    else:
        assert (image == decode_image(whole, name="whole")[0]).all()


@given(data=st.data())
@few
def test_damaged_bytes_never_raise_anything_else(data, small, encode):
    whole = bytearray(encode(small, data.draw(st.sampled_from([*LOSSLESS, "JPEG", "GIF"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, min(len(whole), 200) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = decode_image(bytes(whole), name="damaged")
    except InputError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


def test_16_bit_grey_is_scaled_and_noted(encode):
    grey = np.zeros((50, 50), "uint16")
    grey[10:40, 10:40] = 65535
    image, notes = decode_image(encode(grey, "PNG"), name="deep.png")
    assert image[20, 20].tolist() == [255] * 3 and image[0, 0].tolist() == [0] * 3
    assert any("16-bit" in note for note in notes) and any("grey" in note for note in notes)


def test_16_bit_file_with_8_bit_values_keeps_them(encode):
    image, _ = decode_image(encode(np.full((5, 5), 200, "uint16"), "TIFF"), name="deep.tif")
    assert (image == 200).all()


def test_float_tiff_with_nan_is_refused(encode):
    refusal(encode(np.full((5, 5), np.nan, "float32"), "TIFF"))


def test_grey_is_noted(encode):
    image, notes = decode_image(encode(np.full((5, 5), 77, "uint8"), "PNG"), name="grey.png")
    assert (image == 77).all() and "grey" in notes[0]


def test_palette_keeps_its_colours(small, encode):
    flat = np.where(small.max(2, keepdims=True) > 0, np.uint8([120, 60, 150]), np.uint8(0))
    image, notes = decode_image(encode(Image.fromarray(flat).quantize(4), "PNG"), name="palette.png")
    assert (image == flat).all() and notes == ()


def test_transparent_palette_colour_becomes_black(encode):
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([255, 255, 255, 120, 60, 150])
    picture.paste(0, (0, 0, 10, 20))
    image, _ = decode_image(encode(picture, "PNG", transparency=0), name="palette.png")
    assert image[5, 5].tolist() == [0, 0, 0] and image[5, 15].tolist() == [120, 60, 150]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_become_black(form, small, encode):
    alpha = np.where(small.max(2) > 0, 255, 0).astype("uint8")
    white = np.where(alpha[..., None] > 0, small, 255).astype("uint8")
    image, _ = decode_image(
        encode(np.dstack([white, alpha]), form, **({"exact": True} if form == "WEBP" else {})), name="cut out.png"
    )
    assert (image == small).all()


def test_grey_with_alpha_becomes_black_where_transparent(encode):
    grey = np.dstack([np.full((8, 8), 90, "uint8"), np.repeat([[0, 255]], 4, 1).repeat(8, 0).astype("uint8")])
    image, notes = decode_image(encode(Image.fromarray(grey, "LA"), "PNG"), name="la.png")
    assert (image[:, :4] == 0).all() and (image[:, 4:] == 90).all() and "grey" in notes[0]


def test_cmyk_is_converted_and_noted(encode):
    picture = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    image, notes = decode_image(encode(picture, "TIFF"), name="print.tif")
    assert image[0, 0].tolist() == [255, 0, 255] and "CMYK" in notes[0]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_read_and_noted(form, encode):
    frames = [Image.new("RGB", (12, 12), c) for c in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    image, notes = decode_image(data, name="moving" + SUFFIX[form])
    assert image[5, 5].tolist() == [200, 0, 0] and "first of 3" in notes[0]


@pytest.mark.parametrize(
    "orientation, turned", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))]
)
def test_exif_orientation_is_applied(orientation, turned, small, encode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, _ = decode_image(encode(small, "PNG", exif=exif), name="turned.png")
    assert (image == turned(small)).all()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")


def huge_bmp(width, height):
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 154, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + b"\0" * 100


@pytest.mark.parametrize("build", [huge_png, huge_bmp])
def test_more_than_25_megapixels_is_refused_from_the_header(build):
    sentence = refusal(build(40_000, 50_000))  # a decoder that went on would call this file truncated
    assert "40000 × 50000" in sentence and "25 megapixels" in sentence
    assert "truncated" in refusal(build(4_900, 4_900))


def test_decompression_bomb_is_refused_from_the_header(encode):
    bomb = encode(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 100_000 and "megapixels" in refusal(bomb)


def test_bomb_in_a_text_chunk_is_refused(small, encode):
    data = encode(small, "PNG")
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000))
    refusal(data[:33] + text + data[33:])


axes = st.tuples(st.integers(90, 240), st.integers(90, 240))


@given(seed=st.integers(0, 99), axes=axes, data=st.data())
@few
def test_frame_does_not_depend_on_the_canvas_or_the_place(draw_cell, seed, axes, data):
    canvas = data.draw(st.tuples(st.integers(250, 700), st.integers(250, 700)))
    centre = tuple(data.draw(st.integers(n // 2, side - (n - n // 2))) for n, side in zip(axes, canvas, strict=True))
    spec = FrameSpec(crop=300, size=data.draw(st.sampled_from([96, 160, 224, 300])))
    usual, moved = draw_cell(seed, axes=axes), draw_cell(seed, axes=axes, canvas=canvas, centre=centre)
    assert (frame_cell(usual, spec) == frame_cell(moved, spec)).all()
    assert (frame_cell(moved, spec, box=inspect_cell(moved).box) == frame_cell(moved, spec)).all()


@given(seed=st.integers(0, 99), axes=axes, data=st.data())
@few
def test_a_cell_keeps_its_hash_wherever_it_lies_and_loses_it_with_any_pixel(draw_cell, seed, axes, data):
    canvas = data.draw(st.tuples(st.integers(250, 700), st.integers(250, 700)))
    centre = tuple(data.draw(st.integers(n // 2, side - (n - n // 2))) for n, side in zip(axes, canvas, strict=True))
    usual, moved = draw_cell(seed, axes=axes), draw_cell(seed, axes=axes, canvas=canvas, centre=centre)
    first, again = (cell_hash(image, box=inspect_cell(image).box) for image in (usual, moved))
    assert re.fullmatch("[0-9a-f]{16}", first) and first == again
    moved[centre] ^= 1
    assert cell_hash(moved, box=inspect_cell(moved).box) != first


@given(seed=st.integers(0, 99), axes=axes)
@few
def test_a_crop_at_native_scale_moves_pixels_and_changes_none(draw_cell, seed, axes):
    image = draw_cell(seed, axes=axes)
    framed = frame_cell(image, FrameSpec(crop=300, size=300))
    top, bottom, left, right = cell_box(framed)
    assert framed.shape == (300, 300, 3) and (bottom - top, right - left) == axes
    y0, y1, x0, x1 = cell_box(image)
    assert (framed[top:bottom, left:right] == image[y0:y1, x0:x1]).all()
    assert abs(top - (300 - bottom)) <= 1 and abs(left - (300 - right)) <= 1
    framed = framed.copy()
    framed[top:bottom, left:right] = 0
    assert not framed.any()


@given(size=st.integers(32, 320), crop=st.integers(40, 400))
@few
def test_frame_has_the_asked_size_and_black_stays_black(draw_cell, size, crop):
    spec = FrameSpec(crop=crop, size=size)
    framed = frame_cell(draw_cell(), spec)
    assert framed.shape == (size, size, 3) and framed.dtype == np.uint8
    assert not frame_cell(np.zeros((450, 450, 3), "uint8"), spec).any()
    assume(crop >= 200)
    assert framed.any() and not framed[0, 0].any() and not framed[-1, -1].any()


def test_a_larger_cell_stays_larger(draw_cell):
    spec = FrameSpec(crop=300, size=150)
    area = [(frame_cell(draw_cell(axes=(n, n)), spec).max(2) > 12).sum() for n in (100, 200)]
    assert area[1] == pytest.approx(4 * area[0], rel=0.05)


def test_resize_averages_fine_grain_instead_of_picking_pixels(draw_cell):
    image = draw_cell(axes=(200, 200))
    image[::2] = np.where(image[::2] > 0, 200, 0)
    image[1::2] = np.where(image[1::2] > 0, 100, 0)
    inside = frame_cell(image, FrameSpec(crop=300, size=150))[60:90, 60:90]
    assert np.abs(inside.astype(int) - 150).max() <= 2


def test_crop_takes_the_largest_object(draw_cell):
    image = draw_cell(canvas=(450, 450), centre=(150, 150), axes=(120, 120))
    image[400:420, 400:420] = 90
    assert cell_box(crop_cell(image, 200)) == (40, 160, 40, 160)


@pytest.fixture(scope="module")
def framed(draw_cell):
    return np.stack([frame_cell(draw_cell(i, axes=(200, 100 + 40 * i)), FrameSpec(crop=300, size=96)) for i in range(3)])


@pytest.mark.parametrize("turns", range(-8, 9, 2))
def test_quarter_turns_move_pixels_and_change_none(turns, framed):
    turned = rotate_cells(framed, turns)
    assert all((cell == np.rot90(upright, turns // 2)).all() for cell, upright in zip(turned, framed, strict=True))
    assert turned.flags.c_contiguous and turned.dtype == np.uint8


@pytest.mark.parametrize("turns", range(1, 8, 2))
def test_odd_turns_are_bilinear_turns_by_45_degrees(turns, framed):
    from scipy import ndimage

    turned = rotate_cells(framed, turns)
    expected = ndimage.rotate(framed.astype(float), 45 * turns, axes=(1, 2), reshape=False, order=1)
    assert turned.dtype == np.uint8 and np.abs(turned - expected).max() <= 2
    assert np.abs(turned - framed.astype(float)).max() > 100
    assert (turned == rotate_cells(framed, turns + 8)).all()


def test_turned_frames_are_black_where_nothing_was():
    turned = rotate_cells(np.full((1, 97, 97, 3), 255, "uint8"), 1)[0]
    corners = [turned[y, x].tolist() for y in (0, -1) for x in (0, -1)]
    assert corners == [[0, 0, 0]] * 4 and (turned[30:67, 30:67] == 255).all()
    assert not rotate_cells(np.zeros((2, 96, 96, 3), "uint8"), 3).any()
    assert rotate_cells(np.zeros((0, 96, 96, 3), "uint8"), 1).shape == (0, 96, 96, 3)


@given(st.text(max_size=400))
@settings(deadline=None)
def test_clean_name_is_one_short_harmless_line(name):
    shown = clean_name(name)
    assert 0 < len(shown) <= 200 and shown == shown.strip() and len(shown.splitlines()) == 1
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a/b.png", "a/b.png"),
        ("a\\b.png", "a/b.png"),
        ("invoice\u202egnp.exe", "invoicegnp.exe"),
        ("two\nlines\r\n.png", "two lines .png"),
        ("\0\x1b[31mred", "[31mred"),
        ("<b>bold</b>.png", "<b>bold</b>.png"),
        ("", "unnamed"),
        ("\u200b\n", "unnamed"),
        ("Zu\u0308rich.png", "Zürich.png"),
    ],
)
def test_clean_name(name, shown):
    assert clean_name(name) == shown


def test_long_name_keeps_its_two_ends():
    shown = clean_name("folder" + "x" * 500 + "cell 17.bmp")
    assert len(shown) == 79 and shown.startswith("folder") and shown.endswith("cell 17.bmp") and "…" in shown
    assert shown != clean_name("folder" + "x" * 501 + "cell 17.bmp")  # two patients' names that differ within


def test_long_folders_stay_apart_and_each_stays_one():
    """Names are shortened for showing; patients are told apart by what is shown."""
    long = "ward " + "x" * 90
    paths = [f"{long}/Patient {k:03} {long}/field/{cell}.png" for k in (1, 2) for cell in ("a", "b" * 90)]
    patients = [patient_of(clean_name(path)) for path in paths]
    assert patients[0] == patients[1] != patients[2] == patients[3]
    assert max(len(clean_name(path)) for path in paths) <= 200


@pytest.mark.parametrize(
    "name, subject, patient",
    [
        ("UID_h3_12_5_hem.bmp", "H3", "H3"),
        ("UID_H3_12_5_hem.bmp", "H3", "H3"),
        ("fold_0/all/UID_11_1_2_all.webp", "11", "11"),
        ("uid_11_1_2_ALL.PNG", "11", "11"),
        ("Ms. Doe/cell 1.png", None, "Ms. Doe"),
        ("study/Ms. Doe/images/cell 1.png", None, "study / Ms. Doe / images"),
        ("../../etc/cell.png", None, "etc"),
        ("/cell.png", None, "unnamed patient"),
        ("..\\cell.png", None, "unnamed patient"),
        ("UID_11_1_all.bmp", None, "unnamed patient"),
        ("xUID_11_1_2_all.bmp", None, "unnamed patient"),
    ],
)
def test_subject_and_patient(name, subject, patient):
    assert (subject_of(name), patient_of(name)) == (subject, patient)


def test_decoded_image_does_not_depend_on_metadata(small, encode):
    plain, _ = decode_image(encode(small, "PNG"), name="a.png")
    tagged, _ = decode_image(encode(Image.open(io.BytesIO(encode(small, "PNG"))), "PNG", dpi=(300, 300)), name="a.png")
    assert (plain == tagged).all()
