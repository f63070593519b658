from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.images import decode_image, frame_cell
from model_zoo import FrameSpec
from training.data import SHARED_PICTURES, Cells, index_cells, pack_cells, split_by_subject
from training.errors import DataError

SPEC = FrameSpec(crop=200, size=64)


@pytest.fixture(scope="module")
def picture(draw_cell, encode):
    image = draw_cell(canvas=(120, 120), axes=(80, 70))
    return {form: encode(image, form.upper()) for form in ("bmp", "png", "webp")}


def lay(root, picture, *names):
    """Write one picture under each name; the suffix tells the format."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture[name.rpartition(".")[2].lower()])
    return root


def rows(cells):
    return [(file.name, int(y), s) for file, y, s in zip(cells.files, cells.y_true, cells.subjects, strict=True)]


def test_tcia_folds_in_any_format(tmp_path, picture):
    root = lay(
        tmp_path,
        picture,
        "fold_0/all/UID_11_1_1_all.bmp",
        "fold_0/hem/UID_H14_1_1_hem.png",
        "fold_1/all/UID_11_2_1_all.webp",
        "fold_1/hem/UID_h14_1_2_hem.BMP",
    )
    cells = index_cells(root)
    assert rows(cells) == [
        ("UID_11_1_1_all.bmp", 1, "11"),
        ("UID_H14_1_1_hem.png", 0, "H14"),
        ("UID_11_2_1_all.webp", 1, "11"),
        ("UID_h14_1_2_hem.BMP", 0, "H14"),
    ]
    assert cells.count() == {"all_subjects": 1, "all_cells": 2, "hem_subjects": 1, "hem_cells": 2}
    assert cells.count(cells.y_true == 1)["hem_cells"] == 0


def test_plain_folders_and_both_spellings_of_a_subject(tmp_path, picture):
    root = lay(tmp_path, picture, "all/UID_1_1_1_all.png", "hem/UID_h3_1_1_hem.png", "hem/UID_H3_1_2_hem.png")
    assert index_cells(root).subjects.tolist() == ["1", "H3", "H3"]


def test_kaggle_tree_with_its_renamed_preliminary_cells(tmp_path, picture):
    """Both test sets number their cells from 1.bmp; only the preliminary ones are labelled."""
    root = lay(
        tmp_path,
        picture,
        "training_data/fold_0/all/UID_1_1_1_all.bmp",
        "training_data/fold_0/hem/UID_H1_1_1_hem.bmp",
        "validation_data/C-NMC_test_prelim_phase_data/1.bmp",
        "validation_data/C-NMC_test_prelim_phase_data/2.bmp",
        "testing_data/C-NMC_test_final_phase_data/1.bmp",
        "testing_data/C-NMC_test_final_phase_data/2.bmp",
    )
    for place in ("validation_data", "."):  # Kaggle's place, and TCIA's: beside both folders
        table = root / place / "C-NMC_test_prelim_phase_data_labels.csv"
        table.write_text("Patient_ID,new_names,labels\nUID_57_29_1_all.bmp,1.bmp,1\nUID_H49_1_1_hem.bmp,2.bmp,0\n")
        cells = index_cells(root)
        files = [str(file.relative_to(root)) for file in cells.files]
        assert dict(zip(files, zip(cells.y_true, cells.subjects, strict=True), strict=True)) == {
            "training_data/fold_0/all/UID_1_1_1_all.bmp": (1, "1"),
            "training_data/fold_0/hem/UID_H1_1_1_hem.bmp": (0, "H1"),
            "validation_data/C-NMC_test_prelim_phase_data/1.bmp": (1, "57"),
            "validation_data/C-NMC_test_prelim_phase_data/2.bmp": (0, "H49"),
        }
        table.unlink()


def test_label_file_beside_its_images_and_a_foreign_table(tmp_path, picture):
    root = lay(tmp_path, picture, "1.bmp", "2.bmp")
    (root / "my_labels.csv").write_text("name,labels\n1.bmp,0\n")
    table = "Patient_ID,new_names,labels\nUID_5_1_1_all.bmp,1.bmp,1\nUID_H5_1_1_hem.bmp,2.bmp,0\n"
    (root / "prelim_labels.csv").write_text(table)
    assert rows(index_cells(root)) == [("1.bmp", 1, "5"), ("2.bmp", 0, "H5")]


def test_other_pictures_and_litter_are_left_out(tmp_path, picture):
    root = lay(tmp_path, picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png", "other/cat.png", "all/._UID_1_1_1_all.png")
    (root / "all" / "notes.txt").write_text("x")
    assert len(index_cells(root)) == 2


def test_what_cannot_be_trained_on_is_told(tmp_path, picture):
    with pytest.raises(DataError, match="no folder"):
        index_cells(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no labelled cells"):
        index_cells(tmp_path)
    lay(tmp_path, picture, "all/UID_1_1_1_all.png")
    with pytest.raises(DataError, match="only ALL cells"):
        index_cells(tmp_path)
    lay(tmp_path, picture, "hem/cell 7.png")
    with pytest.raises(DataError, match=r"no subject.*cell 7\.png"):
        index_cells(tmp_path)


def test_subjects_that_share_a_picture_are_one_group(tmp_path, picture):
    shared = sorted(subject for group in SHARED_PICTURES for subject in group)
    names = [f"{'hem/UID_%s_1_1_hem' if s.startswith('H') else 'all/UID_%s_1_1_all'}.png" % s for s in [*shared, "1", "H1"]]
    cells = index_cells(lay(tmp_path, picture, *names))
    group_of = dict(zip(cells.subjects.tolist(), cells.groups.tolist(), strict=True))
    for group in SHARED_PICTURES:
        assert len({group_of[s] for s in group}) == 1
    assert len(set(group_of.values())) == len(SHARED_PICTURES) + 2 and group_of["1"] == "1"


def made_up(counts_all, counts_hem):
    """Cells of subjects with the given numbers of cells; no files."""
    subjects = [(f"{i}", 1, n) for i, n in enumerate(counts_all)] + [(f"H{i}", 0, n) for i, n in enumerate(counts_hem)]
    names = np.repeat([s for s, _, _ in subjects], [n for *_, n in subjects])
    y_true = np.repeat([y for _, y, _ in subjects], [n for *_, n in subjects])
    group_of = {s: "+".join(sorted(g)) for g in SHARED_PICTURES for s in g}
    groups = np.array([group_of.get(s, s) for s in names])
    return Cells(files=[Path(name) for name in names], y_true=y_true, subjects=names, groups=groups)


sizes = st.lists(st.integers(1, 60), min_size=6, max_size=30)


@given(sizes, sizes, st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_split_never_divides_a_group_and_every_fold_holds_both_classes(counts_all, counts_hem, folds, seed):
    cells = made_up(counts_all, counts_hem)
    try:
        fold_of = split_by_subject(cells, folds=folds, seed=seed)
    except DataError as error:
        assert "one class" in str(error) or "at least" in str(error)
        return
    assert set(fold_of) == set(range(folds)) and len(fold_of) == len(cells.y_true)
    for group in set(cells.groups):
        assert len(set(fold_of[cells.groups == group])) == 1
    for fold in range(folds):
        assert set(cells.y_true[fold_of == fold]) == {0, 1}
    assert (fold_of == split_by_subject(cells, folds=folds, seed=seed)).all()


def test_too_few_subjects_are_told():
    with pytest.raises(DataError, match=r"5 folds need at least 5 groups of HEM.*Received: 4"):
        split_by_subject(made_up([3] * 9, [30] * 4), folds=5, seed=0)


def test_split_of_the_real_cells(data_root):
    cells = index_cells(data_root)
    assert cells.count()["all_subjects"] >= 30 and cells.count()["hem_subjects"] >= 15
    for seed in range(5):
        fold_of = split_by_subject(cells, folds=5, seed=seed)
        assert all(len(set(fold_of[cells.groups == group])) == 1 for group in set(cells.groups))
        shares = [cells.y_true[fold_of == fold].mean() for fold in range(5)]
        assert max(shares) - min(shares) < 0.35


def test_pack_is_what_serving_feeds_the_network(real_cells, tmp_path):
    files = real_cells(24)
    cells = Cells(files=files, y_true=np.ones(24), subjects=np.array(["1"] * 24), groups=np.array(["1"] * 24))
    for spec in (FrameSpec(crop=300, size=160), FrameSpec(crop=300, size=300)):
        packed, problems = pack_cells(cells, spec, cache=tmp_path)
        assert problems == [] and packed.shape == (24, spec.size, spec.size, 3) and packed.dtype == np.uint8
        for row, file in zip(packed, files, strict=True):
            assert (row == frame_cell(decode_image(file.read_bytes(), name=file.name)[0], spec)).all()


def test_pack_is_reused_and_read_only(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png")
    cells, steps = index_cells(root), []
    first, _ = pack_cells(cells, SPEC, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    again, _ = pack_cells(index_cells(root), SPEC, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert len(steps) == 2 and (first == again).all() and first.any() and not first.flags.writeable
    other, _ = pack_cells(cells, FrameSpec(crop=200, size=32), cache=tmp_path / "cache")
    assert other.shape == (2, 32, 32, 3)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_unreadable_file_is_reported_by_name_now_and_from_the_cache(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png", "all/UID_1_1_2_all.bmp")
    (root / "all" / "UID_1_1_2_all.bmp").write_bytes(picture["bmp"][:500])
    cells = index_cells(root)
    for _ in range(2):
        packed, problems = pack_cells(cells, SPEC, cache=tmp_path / "cache")
        assert len(problems) == 1 and problems[0].startswith("all/UID_1_1_2_all.bmp: ")
        blank = [file.name for file, row in zip(cells.files, packed, strict=True) if not row.any()]
        assert blank == ["UID_1_1_2_all.bmp"]


def test_count_matches_a_plain_recount(data_root):
    cells = index_cells(data_root)
    plain = {}
    for file in (data_root / "cnmc").rglob("UID_*"):
        _, subject, _, _, label = file.stem.split("_")
        plain.setdefault(label.lower(), []).append(subject.upper())
    subjects = {f"{label}_subjects": len(set(plain[label])) for label in ("all", "hem")}
    assert cells.count() == subjects | {f"{label}_cells": len(plain[label]) for label in ("all", "hem")}


def test_spoilt_table_does_not_hide_the_cells(tmp_path, picture):
    root = lay(tmp_path, picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png")
    (root / "broken_labels.csv").write_bytes(b"\xff\xfePatient_ID\x00,new\n")
    assert len(index_cells(root)) == 2
