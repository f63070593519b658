import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import training.data
from inference.gate import MEASURES
from inference.images import decode_image, frame_cell
from model_zoo import FrameSpec
from training.data import SHARED_PICTURES, Cells, index_cells, name_cells, pack_cells, usual_ranges, verify_cells
from training.errors import DataError, RecipeError
from training.splits import (
    LEFT_OUT,
    TEST,
    TRAINING,
    VALIDATION,
    check_sides,
    split_by_chance,
    split_by_image,
    split_by_stain,
    split_by_subject,
    split_official,
)

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


def test_links_to_folders_are_followed_and_may_form_a_ring(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "fold_0/all/UID_1_1_1_all.png")
    elsewhere = lay(tmp_path / "disk", picture, "fold_1/hem/UID_H1_1_1_hem.png") / "fold_1"
    for link, target in (("fold_1", elsewhere), ("again", elsewhere), ("a", root / "fold_0"), ("fold_0/up", root)):
        (root / link).symlink_to(target)
    (elsewhere / "back").symlink_to(tmp_path)
    files = [str(file.relative_to(root)) for file in index_cells(root).files]
    assert files == ["again/hem/UID_H1_1_1_hem.png", "fold_0/all/UID_1_1_1_all.png"]


def test_images_without_a_label_are_said(tmp_path, picture):
    names = ["all/UID_1_1_1_all.png", "hem/day 2/UID_H1_1_1_hem.png", "c.png", "other/cat.png", "__MACOSX/all/x.png"]
    cells = index_cells(lay(tmp_path, picture, *names))
    assert rows(cells) == [("UID_1_1_1_all.png", 1, "1"), ("UID_H1_1_1_hem.png", 0, "H1")]
    (sentence,) = (line for line in verify_cells(cells, cache=tmp_path / "cache")[1] if line.startswith("Passed over"))
    assert f"2 images without a label (first: {tmp_path.name}/c.png)" in sentence


def test_a_folder_inside_all_or_hem_is_a_subject_where_names_tell_none(tmp_path, picture):
    names = ["all/Lab 7/a.png", "all/Lab 7/day 2/b.png", "hem/H 3/a.png", "hem/H 3/UID_H1_1_1_hem.png", "all/.Trash/9/c.png"]
    assert rows(index_cells(lay(tmp_path, picture, *names))) == [
        ("a.png", 1, "LAB 7"),
        ("b.png", 1, "LAB 7"),
        ("UID_H1_1_1_hem.png", 0, "H1"),
        ("a.png", 0, "H 3"),
    ]


def test_what_cannot_be_trained_on_is_told(tmp_path, picture):
    with pytest.raises(DataError, match="no folder"):
        index_cells(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no labelled cells"):
        index_cells(tmp_path)
    lay(tmp_path, picture, "all/UID_1_1_1_all.png")
    with pytest.raises(DataError, match="only ALL cells"):
        index_cells(tmp_path)
    lay(tmp_path, picture, "hem/cell 7.png")
    with pytest.raises(DataError, match=r"no subject.*cell 7\.png.*subjects\.csv"):
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


@pytest.mark.parametrize("split", [split_by_subject, split_by_chance])
@given(counts_all=sizes, counts_hem=sizes, folds=st.integers(2, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_split_never_divides_a_group_and_every_fold_holds_both_classes(split, counts_all, counts_hem, folds, seed):
    cells = made_up(counts_all, counts_hem)
    try:
        fold_of = split(cells, folds=folds, seed=seed)
    except DataError as error:
        assert "at least" in str(error) or (split is split_by_subject and "one class" in str(error))
        return
    assert set(fold_of) == set(range(folds)) and len(fold_of) == len(cells.y_true)
    for group in set(cells.groups):
        assert len(set(fold_of[cells.groups == group])) == 1
    for fold in range(folds):
        assert set(cells.y_true[fold_of == fold]) == {0, 1}
    if split is split_by_chance:  # as many groups of a class in each
        for value in (0, 1):
            counts = [len(set(cells.groups[(fold_of == fold) & (cells.y_true == value)])) for fold in range(folds)]
            assert max(counts) - min(counts) <= 1
    assert (fold_of == split(cells, folds=folds, seed=seed)).all()


@given(sizes, sizes, st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_folds_by_stain_go_from_the_darkest_subjects_to_the_lightest(counts_all, counts_hem, folds, seed):
    cells = made_up(counts_all, counts_hem)
    cells = replace(cells, measures=np.random.default_rng(seed).random((len(cells), len(MEASURES))))
    try:
        fold_of = split_by_stain(cells, folds=folds)
    except DataError as error:
        assert "at least" in str(error)
        return
    for value in (0, 1):
        of_group = {g: cells.groups == g for g in set(cells.groups[cells.y_true == value])}
        darkest_first = sorted(of_group.values(), key=lambda where: -cells.darkness[where].mean())
        assert all(len(set(fold_of[where])) == 1 for where in darkest_first)
        found = [fold_of[where][0] for where in darkest_first]
        assert found == sorted(found) and set(found) == set(range(folds))


def test_another_seed_is_another_division_by_chance(data_root):
    cells = index_cells(data_root)
    first, second = (split_by_chance(cells, folds=5, seed=seed) for seed in (1, 2))
    of_subject = np.unique(cells.subjects, return_index=True)[1]
    together = (first[of_subject, None] == first[of_subject]) & (second[of_subject, None] == second[of_subject])
    assert 0.6 < (first != second)[of_subject].mean() < 0.95  # four of five, were they dealt anew
    assert together.mean() < 0.5 * (first[of_subject, None] == first[of_subject]).mean()  # and not under other numbers


def test_darkness_is_of_the_cell_alone(tmp_path, encode):
    for i, (label, colour) in enumerate((("all", 63), ("hem", 127))):
        y, x = np.mgrid[:60, :60]
        picture = (
            np.where((y - 30) ** 2 + (x - 30) ** 2 < (12 + 8 * i) ** 2, colour, 0)[..., None].repeat(3, axis=2).astype("uint8")
        )
        lay(tmp_path, {"png": encode(picture, "PNG")}, f"{label}/UID_{'H' * i}1_1_1_{label}.png")
    cells, _ = verify_cells(index_cells(tmp_path), cache=tmp_path / "cache")
    np.testing.assert_allclose(cells.darkness, [np.log10(4), np.log10(2)], atol=1e-4)


@pytest.mark.parametrize("split", [partial(split_by_subject, seed=0), partial(split_by_chance, seed=0), split_by_stain])
def test_too_few_subjects_are_told(split):
    with pytest.raises(DataError, match=r"5 folds need at least 5 groups of HEM.*Received: 4"):
        split(made_up([3] * 9, [30] * 4), folds=5)


@pytest.mark.parametrize("split", [partial(split_by_chance, seed=0), split_by_stain])
def test_folds_of_one_class_are_told(split):
    """Every person has ALL cells, three have one HEM cell each: these count as ALL, wherever the HEM cells come to lie."""
    subjects = np.repeat([f"{i}" for i in range(9)], 3)
    y_true, darkness = np.ones(27, int), np.repeat(np.arange(9.0)[::-1], 3)
    y_true[[0, 3, 6]] = 0
    cells = Cells(files=[Path("x")] * 27, y_true=y_true, subjects=subjects, groups=subjects)
    cells = replace(cells, measures=np.repeat(darkness[:, None], len(MEASURES), axis=1))
    with pytest.raises(DataError, match=r"Fold \d of 3 got cells of one class only"):
        split(cells, folds=3)


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
        packed = pack_cells(cells, spec, cache=tmp_path)
        assert packed.shape == (24, spec.size, spec.size, 3) and packed.dtype == np.uint8
        for row, file in zip(packed, files, strict=True):
            assert (row == frame_cell(decode_image(file.read_bytes(), name=file.name)[0], spec)).all()


def test_pack_is_reused_and_read_only(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png")
    cells, steps = index_cells(root), []
    first = pack_cells(cells, SPEC, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    again = pack_cells(index_cells(root), SPEC, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert len(steps) == 2 and (first == again).all() and first.any() and not first.flags.writeable
    other = pack_cells(cells, FrameSpec(crop=200, size=32), cache=tmp_path / "cache")
    assert other.shape == (2, 32, 32, 3)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_file_that_fails_while_it_is_packed_ends_the_run_and_is_no_black_cell(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png", "all/UID_1_1_2_all.bmp")
    cells, file = index_cells(root), root / "all" / "UID_1_1_2_all.bmp"
    for spoil in (lambda: file.unlink(), lambda: file.write_bytes(picture["bmp"][:500])):
        spoil()
        with pytest.raises(DataError, match=r"UID_1_1_2_all\.bmp.* could be read a moment ago"):
            pack_cells(cells, SPEC, cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
    file.write_bytes(picture["bmp"])
    assert pack_cells(cells, SPEC, cache=tmp_path / "cache").any(axis=(1, 2, 3)).all()


def test_a_file_that_fails_while_it_is_looked_at_is_not_kept_as_damaged(tmp_path, picture, monkeypatch):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png", "all/UID_1_1_2_all.bmp")
    cells, read = index_cells(root), training.data._decode

    def flaky(file):
        if file.suffix == ".bmp":
            raise OSError(5, "Input/output error")
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(training.data, "_decode", flaky)
        with pytest.raises(DataError, match=r"UID_1_1_2_all\.bmp: Input/output error"):
            verify_cells(cells, cache=tmp_path / "cache")
    assert len(verify_cells(cells, cache=tmp_path / "cache")[0]) == 3


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


OFFICIAL = "Patient_ID,new_names,labels\nUID_57_29_1_all.bmp,1.bmp,1\nUID_H49_1_1_hem.bmp,2.bmp,0\n"
PRELIMINARY = "C-NMC_test_prelim_phase_data"


def lay_official(root, picture, *more, table=OFFICIAL):
    """Training folds of two subjects, the preliminary folder with cells 1 and 2, its table beside it."""
    names = ["fold_0/all/UID_1_1_1_all.bmp", "fold_0/hem/UID_H1_1_1_hem.bmp", *(f"{PRELIMINARY}/{n}.bmp" for n in (1, 2))]
    lay(root, picture, *names, *more)
    (root / f"{PRELIMINARY}_labels.csv").write_text(table)
    return root


@pytest.mark.parametrize(
    "table, more, message",
    [
        (OFFICIAL + "UID_57_29_2_all.bmp,3.bmp,1\n", [], r"1 image missing \(first: 3\), 0 images not in the table"),
        (OFFICIAL, [f"{PRELIMINARY}/9.bmp"], r"0 images missing, 1 image not in the table \(first: 9\.bmp\)"),
        (OFFICIAL.replace("1.bmp,1", "1.bmp,0"), [], r"UID_57_29_1_all.bmp' and labels '0' do not fit"),
        (OFFICIAL.replace("UID_57_29_1_all.bmp", "patient57"), [], r"'patient57' and labels '1' do not fit"),
    ],
)
def test_labels_that_do_not_match_the_preliminary_images(tmp_path, picture, table, more, message):
    with pytest.raises(DataError, match=rf"{PRELIMINARY}_labels\.csv.*{message}"):
        index_cells(lay_official(tmp_path, picture, *more, table=table))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_may_come_from_excel(tmp_path, picture, mark):
    """Where the comma is the decimal sign it writes semicolons; and a mark at the beginning."""
    root = lay_official(tmp_path, picture, "new/all/a.png", table=mark + OFFICIAL.replace(",", ";"))
    (root / "subjects.csv").write_text(f"{mark}file;subject\na.png;7, twin\n", "utf-8")
    cells = index_cells(root)
    assert cells.preliminary.sum() == 2 and set(cells.subjects) == {"1", "H1", "57", "H49", "7, TWIN"}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_names_of_two_persons_stay_two_however_a_table_is_saved(tmp_path, picture, encoding):
    root = lay(tmp_path, picture, "all/a.png", "all/b.png", "hem/c.png")
    table = "sep=;\nFile ;SUBJECT\na.png;M\u00fcller\nb.png;M\u00f6ller\nc.png;H\n;\n"
    (root / "subjects.csv").write_text(table, encoding)
    assert index_cells(root).subjects.tolist() == ["M\u00dcLLER", "M\u00d6LLER", "H"]


def test_labels_of_a_folder_that_lack_a_column_are_told(tmp_path, picture):
    root = lay_official(tmp_path, picture, table=OFFICIAL.replace("new_names", "names"))
    with pytest.raises(DataError, match=rf"{PRELIMINARY}_labels\.csv needs.*Patient_ID,new_names.*Received: Patient_ID, names"):
        index_cells(root)
    (root / f"{PRELIMINARY}_labels.csv").rename(root / "fold_0" / "all_labels.csv")  # of a folder that needs none
    assert len(index_cells(root)) == 2


def test_labels_without_their_images_are_passed_over(tmp_path, picture):
    root = lay_official(tmp_path, picture)
    for file in (root / PRELIMINARY).iterdir():
        file.unlink()
    cells = index_cells(root)
    assert len(cells) == 2 and cells.preliminary is None
    with pytest.raises(DataError, match=rf"official split needs the preliminary test set: {PRELIMINARY}.*_labels\.csv"):
        split_official(cells)


def test_official_split(tmp_path, picture):
    """Converted preliminary cells keep their numbers; what shares a picture with a test subject does not train."""
    root = lay_official(tmp_path, picture, "fold_1/all/UID_2_1_1_all.png", "fold_1/hem/UID_H2_1_1_hem.png")
    (root / PRELIMINARY / "1.bmp").unlink()
    cells = index_cells(lay(root, picture, f"{PRELIMINARY}/1.png"))
    assert cells.subjects.tolist() == ["57", "H49", "1", "H1", "2", "H2"]
    assert split_official(cells).tolist() == [TEST, TEST] + [TRAINING] * 4
    groups = np.array(["2+57", "H49", "1", "H1", "2+57", "H2+H4+H5+H6"])
    shared = Cells(**{f: getattr(cells, f) for f in ("files", "y_true", "subjects", "preliminary")}, groups=groups)
    sides = split_official(shared)
    assert sides.tolist() == [TEST, TEST, TRAINING, TRAINING, LEFT_OUT, TRAINING]
    check_sides(shared, sides)
    with pytest.raises(DataError, match="Subjects 2, 57 share pictures but lie on both sides"):
        check_sides(shared, split_official(cells))
    with pytest.raises(DataError, match="training folds hold no HEM cells"):
        split_official(cells.choose(cells.subjects != "H1").choose(np.array([0, 1, 2, 3])))


def test_subjects_from_a_table(tmp_path, picture):
    root = lay(tmp_path, picture, "all/a.png", "hem/a.png", "hem/b.png", "hem/UID_H3_1_1_hem.png", "new/c.png", "new/d.png")
    (root / "subjects.csv").write_text(
        "file,subject,label\nall/a.png,Anna\u202e,\nhem\\a.png,20,hem\nb.png,21,0\nnew/c.png, zoe ,ALL\n", "utf-8"
    )
    cells = index_cells(root)
    assert [(f.parent.name + "/" + n, y, s) for f, (n, y, s) in zip(cells.files, rows(cells), strict=True)] == [
        ("all/a.png", 1, "ANNA"),
        ("hem/UID_H3_1_1_hem.png", 0, "H3"),
        ("hem/a.png", 0, "20"),
        ("hem/b.png", 0, "21"),
        ("new/c.png", 1, "ZOE"),
    ]
    # C-NMC's pictures are shared by its own 20 and 21, not by a laboratory's
    assert cells.groups.tolist() == ["ANNA", "H10+H3", "20", "21", "ZOE"]


@pytest.mark.parametrize(
    "table, message",
    [
        ("", "needs the columns file,subject.*no rows"),
        ("image,person\na.png,1\n", "needs the columns file,subject.*Received: image, person"),
        ("file,subject\na.png,1\nno.png,2\n../x.png,2\n", r"2 images not found \(first: no\.png\)"),
        ("file,subject\na.png,1\nsame.png,2\n", r"1 image not found \(first: same\.png\)"),
        ("file,subject\na.png\n", "line 2, a.png: the subject is empty"),
        ("file,subject\na.png,1\na.png,2\n", "line 3, a.png: the image is named a second time"),
        ("file,subject,label\na.png,1,hem\n", "line 2, a.png: the label 'hem' contradicts the folder"),
        (
            "file,subject,label\nx.png,1,maybe\n",
            "line 2, x.png: neither.* must say all or hem. Received: 'maybe'",
        ),
        ("file,subject\nx.png,1\n", "line 2, x.png: neither folder nor name tells it, so a column label must say"),
        ("file,subject\nall/same.png,1\na.png,1\n", r"1 labelled images carry no subject.*hem/same\.png"),
        ("file,subject\n" + "x" * 200_000 + ",1\n", "needs the columns file,subject"),
    ],
)
def test_table_of_subjects_that_does_not_match(tmp_path, picture, table, message):
    root = lay(tmp_path, picture, "all/a.png", "all/same.png", "hem/same.png", "x.png")
    (root / "subjects.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        index_cells(root)


def test_names_with_umlauts_are_found_however_a_disk_spells_them(tmp_path, picture):
    composed, apart = "B\u00e4rbel", "Ba\u0308rbel"
    root = lay(tmp_path, picture, f"all/{apart}_1.png", f"all/{composed}_2.png", "hem/UID_H1_1_1_hem.png")
    (root / "subjects.csv").write_text(f"file,subject\n{composed}_1.png,{composed}\nall/{apart}_2.png,{apart}\n", "utf-8")
    assert index_cells(root).subjects.tolist() == [composed.upper()] * 2 + ["H1"]


@pytest.fixture(scope="module")
def pictures(draw_cell, encode):
    """Several different pictures as PNG."""
    return [encode(draw_cell(seed, canvas=(40, 40), axes=(30, 20)), "PNG") for seed in range(6)]


def lay_pictures(root, pictures, chosen):
    """Write picture number `chosen[name]` under each name."""
    for name, number in chosen.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(pictures[number])
    return root


def test_ordinary_cells_verify_without_a_word(tmp_path, pictures):
    names = ["UID_20_1_1_all.png", "UID_21_1_1_all.png", "UID_H1_1_1_hem.png"]
    cells, steps = index_cells(lay_pictures(tmp_path / "data", pictures, {name: i for i, name in enumerate(names)})), []
    for _ in range(2):
        checked, sentences = verify_cells(cells, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
        assert sentences == [] and checked.files == cells.files and checked.groups.tolist() == ["20+21", "20+21", "H1"]
        assert checked.fingerprint == cells.fingerprint
    assert steps == [(1, 3), (2, 3), (3, 3)]  # the second time nothing is decoded


def test_shared_pictures_join_groups_and_are_told(tmp_path, pictures, encode):
    root = lay_pictures(
        tmp_path / "data",
        pictures,
        {
            **{"UID_1_1_1_all.png": 0, "UID_2_1_1_all.png": 0, "UID_20_1_1_all.png": 0, "UID_20_1_2_all.png": 5},
            **{"UID_H1_1_1_hem.png": 1, "UID_H1_1_2_hem.png": 1, "UID_H7_1_1_hem.png": 2, "UID_8_1_1_all.png": 2},
            **{"UID_9_1_1_all.png": 3, "UID_9_1_1_hem.png": 4},
        },
    )
    pixels = decode_image(pictures[5], name="x")[0]
    (root / "UID_21_1_1_all.bmp").write_bytes(encode(pixels, "BMP"))  # known already, and in another format
    cells, sentences = verify_cells(index_cells(root), cache=tmp_path / "cache")
    group_of = dict(zip(cells.subjects.tolist(), cells.groups.tolist(), strict=True))
    assert group_of == {
        **dict.fromkeys(["1", "2", "20", "21"], "1+2+20+21"), **dict.fromkeys(["8", "H7"], "8+H7"), "9": "9", "H1": "H1",
    }  # fmt: skip
    told = "\n".join(sentences)
    assert "Subjects 1, 2, 20, 21 share 1 picture(s), such as data/UID_1_1_1_all.png = " in told
    assert "1 picture(s) carry both labels, such as data/UID_8_1_1_all.png = data/UID_H7_1_1_hem.png" in told
    assert "1 picture(s) occur again in one subject, such as data/UID_H1_1_1_hem.png" in told
    assert "both classes in subject(s) 9:" in told
    assert len(sentences) == 5 and "Subjects 8, H7 share 1" in told


@pytest.mark.parametrize("level", [0, 255])
def test_what_is_no_cell_is_left_out_and_said(level, tmp_path, pictures, encode):
    root = lay_pictures(tmp_path / "data", pictures, {"UID_1_1_1_all.png": 0, "UID_H1_1_1_hem.png": 1})
    (root / "UID_2_1_1_all.png").write_bytes(encode(np.full((40, 40, 3), level, "uint8"), "PNG"))
    checked, said = verify_cells(index_cells(root), cache=tmp_path / "cache")
    assert checked.subjects.tolist() == ["1", "H1"] and said[0].startswith("1 of 3 images cannot be read as cells")
    assert said[1].startswith("data/UID_2_1_1_all.png: ")


def test_unreadable_images_are_listed_counted_and_left_out(tmp_path, pictures):
    chosen = {"UID_1_1_1_all.png": 0, "UID_2_1_1_all.png": 1, "UID_H1_1_1_hem.png": 2, "UID_H2_1_1_hem.png": 3}
    root = lay_pictures(tmp_path / "data", pictures, chosen)
    (root / "UID_2_1_1_all.png").write_bytes(pictures[1][:200])
    (root / "UID_H2_1_1_hem.png").write_bytes(b"")
    cells = index_cells(root)
    for _ in range(2):
        checked, (count, *listed) = verify_cells(cells, cache=tmp_path / "cache")
        assert count == "2 of 4 images cannot be read as cells and are left out:"
        assert [line.partition(": ")[0] for line in listed] == ["data/UID_2_1_1_all.png", "data/UID_H2_1_1_hem.png"]
        assert checked.subjects.tolist() == ["1", "H1"] and checked.fingerprint != cells.fingerprint
    (root / "UID_H1_1_1_hem.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"No HEM image could be read\. First: data/UID_2_1_1_all\.png: "):
        verify_cells(index_cells(root), cache=tmp_path / "cache")


def test_images_of_several_sizes_are_told(tmp_path, pictures, picture):
    root = lay_pictures(tmp_path / "data", pictures, {"UID_1_1_1_all.png": 0, "UID_H1_1_1_hem.png": 1})
    lay(root, picture, "UID_H2_1_1_hem.png")
    (sentence,) = verify_cells(index_cells(root), cache=tmp_path / "cache")[1]
    assert "Images of 2 sizes, mostly 40 × 40 (2), 120 × 120 (1)." in sentence


def test_grey_images_are_counted(tmp_path, pictures, encode):
    root = lay_pictures(tmp_path / "data", pictures, {"UID_1_1_1_all.png": 0, "UID_H1_1_1_hem.png": 1})
    grey = Image.fromarray(decode_image(pictures[2], name="x")[0]).convert("L")
    for name, form in (("UID_2_1_1_all.png", grey), ("UID_H2_1_1_hem.png", grey.rotate(90).convert("RGB"))):
        (root / name).write_bytes(encode(form, "PNG"))
    (sentence,) = verify_cells(index_cells(root), cache=tmp_path / "cache")[1]
    assert sentence.startswith("2 images in grey (first: data/UID_2_1_1_all.png): ")


y, x = np.mgrid[:24, :24]
disc = ((y - 11) ** 2 + (x - 11) ** 2 < 110)[..., None].repeat(3, axis=2)  # the smallest cell there may be

structures = st.lists(  # (subject's number, healthy, picture's number) of each cell
    st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 90)), min_size=16, max_size=40
)


@given(structures, st.integers(2, 3), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_no_group_and_no_picture_ever_lies_on_two_sides(structure, folds, seed):
    """Random subjects that share random pictures, some of them in the preliminary set; from files to sides."""
    with tempfile.TemporaryDirectory() as folder:
        root, table = Path(folder, "data"), ["Patient_ID,new_names"]
        (root / PRELIMINARY).mkdir(parents=True)
        picture_of = {}
        for i, (number, healthy, picture) in enumerate(structure):
            subject, label = (f"H{number}", "hem") if healthy else (f"{number}", "all")
            file = root / f"UID_{subject}_1_{i}_{label}.bmp"
            if number > 7:
                table.append(f"{file.name},{i}.bmp")
                file = root / PRELIMINARY / f"{i}.bmp"
            Image.fromarray((disc * (2 * picture + 20)).astype("uint8")).save(file)
            picture_of[file] = picture
        (root / f"{PRELIMINARY}_labels.csv").write_text("\n".join(table))
        try:
            cells, _ = verify_cells(index_cells(root), cache=Path(folder, "cache"))
        except DataError as error:
            assert "Training needs both classes" in str(error)
            return
    shown = np.array([picture_of[file] for file in cells.files])
    check_groups_are_the_connected_subjects(cells, shown)
    for split in (lambda: split_by_subject(cells, folds=folds, seed=seed), lambda: split_official(cells)):
        try:
            sides = split()
        except DataError as error:
            assert any(word in str(error) for word in ("at least", "one class only", "hold no", "official split needs"))
            continue
        check_sides(cells, sides)
        for of_one in (cells.subjects, cells.groups, shown):
            assert all(len(set(sides[of_one == one]) - {LEFT_OUT}) == 1 for one in set(of_one[sides != LEFT_OUT]))


def check_groups_are_the_connected_subjects(cells, shown):
    """By walking from each subject to all it shares a picture with."""
    subjects = set(cells.subjects.tolist())
    neighbours = {s: set(cells.subjects[np.isin(shown, shown[cells.subjects == s])].tolist()) for s in subjects}
    for known in SHARED_PICTURES:
        for subject in known & subjects:
            neighbours[subject] |= known & subjects
    for subject in subjects:
        reached, ahead = set(), {subject}
        while ahead:
            reached |= ahead
            ahead = set().union(*(neighbours[s] for s in ahead)) - reached
        (group,) = set(cells.groups[cells.subjects == subject])
        assert set(cells.subjects[cells.groups == group].tolist()) == reached


@given(
    sizes,
    sizes,
    st.sampled_from([(0.6, 0.2, 0.2), (0.8, 0.2, 0.0), (0.9, 0.05, 0.05), (1 / 3, 1 / 3, 1 / 3)]),
    st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_split_by_image_keeps_shares_within_each_class(counts_all, counts_hem, shares, seed):
    cells = made_up(counts_all, counts_hem)
    try:
        sides = split_by_image(cells, shares=shares, seed=seed)
    except DataError:
        assert min(sum(counts_all), sum(counts_hem)) * 0.05 < 1
        return
    for value in (0, 1):
        of_class = sides[cells.y_true == value]
        for side, share in zip((TRAINING, VALIDATION, TEST), shares, strict=True):
            assert abs((of_class == side).sum() - share * len(of_class)) <= 1
    assert (sides == split_by_image(cells, shares=shares, seed=seed)).all()
    assert len(cells) < 40 or (sides != split_by_image(cells, shares=shares, seed=seed + 1)).any()


def test_shares_that_are_none():
    for shares in ([0.5, 0.5], [0.9, 0.2, -0.1], [0.5, 0.2, 0.2]):
        with pytest.raises(RecipeError, match="sum 1"):
            split_by_image(made_up([3], [3]), shares=shares, seed=0)


def test_one_subject_of_a_class_is_told():
    with pytest.raises(DataError, match=r"Received: 1\. Choose protocol = \"image_level\".*or add subjects"):
        split_by_subject(made_up([3] * 9, [30]), folds=5, seed=0)


def test_chosen_cells_keep_all_that_is_known_of_them(tmp_path, picture):
    cells, _ = verify_cells(index_cells(lay_official(tmp_path, picture)), cache=tmp_path / "cache")
    chosen = cells.choose(cells.y_true == 0)
    assert chosen.subjects.tolist() == ["H49", "H1"] and chosen.preliminary.tolist() == [True, False]
    assert chosen.files == [cells.files[1], cells.files[3]] and chosen.digests == [cells.digests[1], cells.digests[3]]
    assert cells.choose(np.array([3, 1])).subjects.tolist() == ["H1", "H49"]
    assert cells.fingerprint != chosen.fingerprint == replace(chosen, digests=None).fingerprint


def test_changed_pixels_are_packed_anew_whatever_name_size_and_time_say(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.bmp", "hem/UID_H1_1_1_hem.bmp")
    first = pack_cells(index_cells(root), SPEC, cache=tmp_path / "cache")
    file = root / "all" / "UID_1_1_1_all.bmp"
    before, content = file.stat(), bytearray(file.read_bytes())
    centre = 54 + 3 * (60 * 120 + 60)
    content[centre : centre + 3] = bytes(255 - b for b in content[centre : centre + 3])
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = pack_cells(index_cells(root), SPEC, cache=tmp_path / "cache")
    assert (first[0] != second[0]).any() and (first[1] == second[1]).all()


def test_moved_folder_is_the_same_data(tmp_path, picture):
    root = lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png")
    before = index_cells(root).fingerprint
    assert index_cells(root.rename(tmp_path / "elsewhere")).fingerprint == before


def test_a_data_folder_may_have_any_name_also_where_its_images_lie_in_itself(tmp_path, picture):
    """Also one that is called ALL: it labels nothing."""
    lay(tmp_path / "lab", picture, "1.png", "2.png", "3.png")
    (tmp_path / "lab" / "subjects.csv").write_text("file,subject,label\n1.png,A,all\n2.png,B,hem\n")
    before = index_cells(tmp_path / "lab").fingerprint
    after = index_cells((tmp_path / "lab").rename(tmp_path / "ALL"))
    assert before == after.fingerprint and after.y_true.tolist() == [1, 0] and len(after.unlabelled) == 1


def test_full_disk_leaves_nothing_half_written(tmp_path, picture):
    """A limit on the size of files stands for the disk: writing fails in the midst of the array."""
    import resource

    cells = index_cells(
        lay(tmp_path / "data", picture, *(f"{c}/UID_{i}_1_1_{c}.png" for i in range(9) for c in ("all", "hem")))
    )
    spec, limits = FrameSpec(crop=300, size=300), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cache cannot take 18 framed cells \(0\.0 GB\): .*\. Free space"):
            pack_cells(cells, spec, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []
    assert pack_cells(cells, spec, cache=tmp_path / "cache").shape == (18, 300, 300, 3)


@pytest.mark.parametrize("prepare", [verify_cells, lambda cells, cache: pack_cells(cells, SPEC, cache=cache)])
def test_cache_that_cannot_be_written_is_told(tmp_path, picture, prepare):
    cells = index_cells(lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"file/cache cannot take .*: Not a directory\. .* folder you may write to"):
        prepare(cells, cache=tmp_path / "file" / "cache")


def test_what_a_killed_run_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path, picture):
    cells = index_cells(lay(tmp_path / "data", picture, "all/UID_1_1_1_all.png", "hem/UID_H1_1_1_hem.png"))
    dead, living = (tmp_path / name for name in ("a.npy.1.partial", "b.npy.2.partial"))
    dead.touch(), living.touch()
    os.utime(dead, (time.time() - 7200,) * 2)
    pack_cells(cells, SPEC, cache=tmp_path)
    assert not dead.exists() and living.exists()


def test_a_cell_is_called_by_its_file_name_or_where_that_is_not_enough_by_its_path():
    root = Path("/cells")
    files = [root / "a" / "1.bmp", root / "b" / "1.png", root / "b" / "2.png", root / "c" / "d" / "2.png"]
    assert name_cells(files, ["P1", "P1", "P1", "P2"]) == ["a/1.bmp", "b/1.png", "2.png", "2.png"]
    named = [Path(name) for name in name_cells(files, ["P1", "P1", "P1", "P2"])]
    assert name_cells(named, ["P1", "P1", "P1", "P2"]) == ["a/1.bmp", "b/1.png", "2.png", "2.png"]  # an ensemble's members'
    assert name_cells([], []) == []


@given(st.integers(2, 60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_usual_ranges_hold_every_known_person_and_narrow_with_their_number(persons, seed):
    cells = made_up([20] * persons, [20])
    cells = replace(cells, measures=np.random.default_rng(seed).normal(5, 1, (len(cells), len(MEASURES))))
    usual = usual_ranges(cells)
    for name, column in zip(MEASURES, cells.measures.T, strict=True):
        low, high = usual[name]["cell"]
        assert 0 < ((column < low) | (column > high)).sum() <= max(2, 0.002 * len(column))
        medians = np.array([np.median(column[cells.subjects == s]) for s in set(cells.subjects)])
        low, high = usual[name]["person"]
        beyond = 1.2 / np.sqrt(len(medians)) * np.ptp(medians)
        np.testing.assert_allclose([medians.min() - low, high - medians.max()], beyond, atol=2e-4)
