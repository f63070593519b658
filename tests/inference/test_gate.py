import numpy as np
import pytest
from PIL import Image

from inference.gate import cell_box, cell_mask, describe_unlike, inspect_cell
from inference.images import decode_image


def read(file):
    return decode_image(file.read_bytes(), name=file.name)[0]


def spread(files, n):
    files = sorted(files)
    assert files
    return [files[i] for i in np.linspace(0, len(files) - 1, n).astype(int)]


def test_drawn_cell_is_a_cell(draw_cell):
    quality = inspect_cell(draw_cell(axes=(160, 160)))
    assert quality.kind == "cell" and quality.reasons == ()
    assert quality.measures[0] == pytest.approx(160, rel=0.01)
    assert quality.box == (145, 305, 145, 305)


def test_mask_is_the_largest_object(draw_cell):
    image = draw_cell()
    alone = cell_mask(image)
    image[:20, :20] = 200
    assert (cell_mask(image) == alone).all() and alone.any()


@pytest.mark.parametrize("level", [0, 12])
def test_blank_is_refused(level):
    quality = inspect_cell(np.full((450, 450, 3), level, "uint8"))
    assert quality.kind == "refused" and "no cell" in quality.reasons[0]
    assert quality.box == cell_box(np.zeros((450, 450, 3), "uint8")) == (0, 450, 0, 450)


def test_a_speck_is_no_cell(draw_cell):
    assert inspect_cell(draw_cell(axes=(10, 10))).kind == "refused"


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 400, 3), (3, 2, 3)])
def test_smallest_images_are_refused(shape):
    assert inspect_cell(np.full(shape, 200, "uint8")).kind == "refused"


def test_cell_cut_at_the_edge_is_scored_with_a_note(draw_cell):
    quality = inspect_cell(draw_cell(centre=(60, 225)))
    assert quality.kind == "unusual" and any("edge" in r for r in quality.reasons)


def test_two_cells_are_scored_with_a_note(draw_cell):
    image = np.maximum(draw_cell(centre=(120, 120)), draw_cell(centre=(330, 330), axes=(120, 130)))
    quality = inspect_cell(image)
    assert quality.kind == "unusual" and any("more than one" in r for r in quality.reasons)


@pytest.mark.parametrize(("diameter", "how"), [(40, "smaller"), (360, "larger")])
def test_another_magnification_is_noted(diameter, how, draw_cell, usual):
    quality = inspect_cell(draw_cell(axes=(diameter, diameter)))
    assert quality.kind == "cell" and f"diameter {diameter} px, {how} than" in describe_unlike(quality.measures, usual)[0]
    assert describe_unlike(quality.measures, None) == []  # where a card does not say what its network knows


def test_black_alone_has_no_measures():
    assert inspect_cell(np.zeros((450, 450, 3), "uint8")).measures == ()


def test_a_white_cell_is_measured_too(draw_cell):
    image = draw_cell()
    image[image.max(axis=2) > 0] = 255
    assert inspect_cell(image).measures[1:] == (0, 0, 0)


CHANGED = {
    "paler": lambda x: 255 * (x / 255) ** 0.5,
    "darker": lambda x: 255 * (x / 255) ** 1.6,
    "another colour": lambda x: x[..., ::-1],  # read as BGR
    "another colour, warm": lambda x: np.clip(x * [1.3, 1, 0.8], 0, 255),
    "another colour, grey": lambda x: x.mean(axis=-1, keepdims=True).repeat(3, axis=-1),
}


@pytest.mark.parametrize("how", CHANGED)
def test_real_cells_in_another_stain_or_light_carry_a_note(how, real_cells, usual):
    reasons = []
    for file in (files := real_cells(30)):
        changed = np.rint(CHANGED[how](read(file).astype(float))).astype("uint8")
        reasons.append(" ".join(describe_unlike(inspect_cell(changed).measures, usual)))
    assert sum(how.split(",")[0] in reason for reason in reasons) > 0.7 * len(files)


@pytest.mark.parametrize("sides", [(140, 140), (100, 220)])
def test_a_picture_in_a_black_frame_is_refused(sides):
    image = np.zeros((450, 450, 3), "uint8")
    image[100 : 100 + sides[0], 80 : 80 + sides[1]] = np.random.default_rng(0).integers(60, 255, (*sides, 3))
    quality = inspect_cell(image)
    assert quality.kind == "refused" and "straight sides" in quality.reasons[0]


@pytest.mark.parametrize("folder", ["not_cells", "other_cells"])
def test_other_pictures_in_a_black_frame_are_refused(folder, data_root):
    files = [f for f in (data_root / folder).rglob("*") if f.suffix in (".webp", ".png", ".jpg")]
    for file in spread(files, min(len(files), 20)):
        picture = read(file)[:250, :250]
        framed = np.pad(picture, ((60, 60), (60, 60), (0, 0)))
        assert inspect_cell(framed).kind == "refused", file.name


@pytest.mark.parametrize("scale", [0.4, 1.6])
def test_real_cells_at_another_magnification_carry_a_note(scale, real_cells, usual):
    noted = 0
    for file in (files := real_cells(20)):
        picture = Image.fromarray(read(file))
        resized = np.asarray(picture.resize([round(scale * side) for side in picture.size], Image.Resampling.BILINEAR))
        noted += any("another magnification" in reason for reason in describe_unlike(inspect_cell(resized).measures, usual))
    assert noted > 0.8 * len(files)


def test_bright_background_is_refused_with_the_way_out(draw_cell):
    image = draw_cell()
    image[image.max(2) == 0] = (230, 220, 225)
    quality = inspect_cell(image)
    assert quality.kind == "refused" and "black" in quality.reasons[0]


def test_real_cells_are_cells(real_cells, usual):
    found = {file.name: inspect_cell(read(file)) for file in real_cells(60)}
    odd = {name: (*q.reasons, *describe_unlike(q.measures, usual)) for name, q in found.items()}
    assert {name: reasons for name, reasons in odd.items() if reasons or found[name].kind != "cell"} == {}


@pytest.mark.parametrize("folder", ["not_cells", "smear_fields", "other_cells"])
def test_other_pictures_are_refused(folder, data_root):
    files = [f for f in (data_root / folder).rglob("*") if f.suffix in (".webp", ".png", ".jpg")]
    accepted = [file.name for file in spread(files, min(len(files), 60)) if inspect_cell(read(file)).kind != "refused"]
    assert accepted == []
