import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from inference import synthetic
from training.synthesis import describe_cell


@pytest.fixture(scope="module")
def cells():
    """Forty cells of each class, each of its own subject."""
    rng = np.random.default_rng(0)
    return {label: np.stack([synthetic.synthetic_cell(label, rng) for _ in range(40)]) for label in ("all", "hem")}


@pytest.fixture(scope="module")
def patients():
    return synthetic.demo_patients()


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def diameters(images):
    return np.sqrt(images.any(-1).sum((1, 2)) * 4 / np.pi)


@pytest.mark.parametrize("label", ["all", "hem"])
def test_a_cell_is_one_centred_piece_on_exact_black(cells, label):
    for image in cells[label]:
        mask = image.any(-1)
        assert image.shape == (450, 450, 3) and image.dtype == np.uint8
        assert ndimage.label(mask)[1] == 1
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
        assert np.abs(np.subtract(ndimage.center_of_mass(mask), 225)).max() < 4
        assert mask[200:250, 200:250].mean() > 0.9


@pytest.mark.parametrize("label", ["all", "hem"])
def test_extents_stay_in_the_range_of_real_cells(cells, label):
    for image in cells[label]:
        rows, columns = ndimage.find_objects(image.any(-1).astype(int))[0]
        assert 90 <= rows.stop - rows.start <= 300
        assert 90 <= columns.stop - columns.start <= 300


def test_leukaemic_cells_are_larger_than_healthy_ones(cells):
    all_, hem = diameters(cells["all"]), diameters(cells["hem"])
    assert all_.mean() - hem.mean() > 3 * np.sqrt(all_.var() / len(all_) + hem.var() / len(hem))
    assert 200 < np.median(all_) < 235  # C-NMC: 216
    assert 170 < np.median(hem) < 210  # C-NMC: 189


@pytest.mark.parametrize("label", ["all", "hem"])
def test_colour_is_that_of_a_stained_nucleus(cells, label):
    red, green, blue = np.median(cells[label][cells[label].any(-1)], axis=0)
    assert green < red < blue  # violet
    assert 50 < red < 90 and 18 < green < 40 and 60 < blue < 100  # C-NMC: 5th to 95th percentile of cells


def test_cells_of_one_patient_differ_in_size_shape_and_chromatin(patients):
    for files in patients.values():
        images = np.stack([decode(data) for _, data in files])
        assert diameters(images).std() / diameters(images).mean() > 0.05
        patches = images[:, 195:255, 195:255, 0].reshape(len(images), -1).astype(float)
        correlation = np.corrcoef(patches) - np.eye(len(images))
        assert np.abs(correlation).max() < 0.9
        assert np.abs(correlation).mean() < 0.3


def test_cells_of_one_subject_share_its_stain():
    rng = np.random.default_rng(0)
    colours = []
    for _ in range(12):
        subject = synthetic.draw_subject(rng)
        drawn = [synthetic.synthetic_cell("all", rng, subject=subject) for _ in range(6)]
        colours.append([np.log(image[image.any(-1)].mean()) for image in drawn])
    colours = np.array(colours)
    chance = colours.var(axis=1, ddof=1).mean() / colours.shape[1]
    assert colours.mean(axis=1).var(ddof=1) > 2 * chance


def test_rendering_gives_the_statistics_asked_for():
    """Describing many drawn cells returns the mean that they were drawn with, and a change of it."""
    rng = np.random.default_rng(0)
    vector = synthetic._load()["all_mean"].astype(float)
    changed = vector.copy()
    changed[synthetic.LAYOUT["radius"]] -= 0.2
    changed[synthetic.LAYOUT["colour"]] += 0.3
    changed[synthetic.LAYOUT["outline"]] -= 1.0
    before, after = (
        np.mean([describe_cell(synthetic.render(each, rng)) for _ in range(8)], axis=0) for each in (vector, changed)
    )
    difference = {name: (after - before)[where].mean() for name, where in synthetic.LAYOUT.items()}
    assert difference["radius"] == pytest.approx(-0.2, abs=0.03)
    assert difference["colour"] == pytest.approx(0.3, abs=0.1)
    assert difference["outline"] == pytest.approx(-1.0, abs=0.5)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (synthetic.synthetic_patient("all", n=3, seed=seed, patient="P") for seed in (5, 5, 6))
    assert first == again
    assert not {data for _, data in first} & {data for _, data in other}


def test_demo_patients_are_three_uploads_that_decode(patients):
    assert {name: len(files) for name, files in patients.items()} == {
        "Demo patient A (synthetic)": 62,
        "Demo patient B (synthetic)": 57,
        "Demo patient C (synthetic)": 40,
    }
    for patient, files in patients.items():
        assert [name for name, _ in files] == [f"{patient}/cell {i:03d}.png" for i in range(1, len(files) + 1)]
        assert len({data for _, data in files}) == len(files)
        for _, data in files:
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (450, 450))


def test_a_mixed_patient_has_half_of_its_cells_from_each_class():
    """Give one class a size that no cell of the other has, and count."""
    fitted = dict(synthetic._load())
    where = synthetic.LAYOUT["radius"]
    for label, radius in (("all", 110), ("hem", 60)):
        fitted[f"{label}_mean"] = fitted[f"{label}_mean"].copy()
        fitted[f"{label}_mean"][where] = np.log(radius)
        fitted[f"{label}_cell"] = fitted[f"{label}_cell"] * 0.1
    files = synthetic.synthetic_patient("mixed", n=10, seed=1, fitted=fitted)
    images = np.stack([decode(data) for _, data in files])
    assert (diameters(images) > 165).sum() == 5


@pytest.mark.parametrize("label", ["ALL", "blast", "", None])
def test_an_unknown_label_is_refused_by_name(label):
    with pytest.raises(ValueError, match=f"Received: label={label!r}"):
        synthetic.synthetic_cell(label, np.random.default_rng(0))


def test_the_parameter_file_holds_statistics_only():
    """Every array is a mean, a limit or a factor of a covariance over features: none has an axis of cells or pixels."""
    path = synthetic.Path(synthetic.__file__).with_name("synthetic_cells.npz")
    assert path.stat().st_size < 2 * 1024**2
    d, effects, bands = synthetic.DIMENSION, synthetic.EFFECTS, len(synthetic.HARMONICS) - 1
    shapes = {"subject": (d, effects)}
    for label in ("all", "hem"):
        shapes |= {f"{label}_mean": (d,), f"{label}_cell": (d, d), f"{label}_roughest": (bands,)}
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].shape for name in file.files} == shapes
        assert all(np.isfinite(file[name]).all() for name in file.files)
