"""A folder of C-NMC cells: index it, split it by subject, pack it into one array."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.errors import InputError
from inference.images import decode_image, frame_cell, subject_of
from model_zoo import FrameSpec
from training.errors import DataError

IMAGE_SUFFIXES = {".bmp", ".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff"}
# The official set holds the same picture under several subjects: each group stays on one side of a split.
SHARED_PICTURES = [{"20", "21"}, {"51", "75", "78"}, {"H2", "H4", "H5", "H6"}, {"H10", "H3"}]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """An indexed folder; position i of every field is one cell.

    Attributes:
        files: paths.
        y_true: int (n,), 1 = ALL.
        subjects: str (n,), upper case.
        groups: str (n,), subjects that share a picture have one group.
    """

    files: list[Path]
    y_true: np.ndarray
    subjects: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def count(self, where: np.ndarray | None = None) -> dict:
        """Cells and subjects by class, of all or of the chosen positions."""
        y, subjects = (self.y_true, self.subjects) if where is None else (self.y_true[where], self.subjects[where])
        return {
            f"{label}_{what}": int(n)
            for label, value in (("all", 1), ("hem", 0))
            for what, n in (("subjects", len(set(subjects[y == value]))), ("cells", (y == value).sum()))
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and sizes: the same files in the same order have the same one."""
        text = "\n".join(f"{cell_label(f)}\t{f.stat().st_size}" for f in self.files)
        return hashlib.sha256(text.encode()).hexdigest()


def index_cells(root: Path) -> Cells:
    """Index a folder of labelled cells.

    Understands any tree whose images lie in folders `all` and `hem` (TCIA `fold_*/{all,hem}`, Kaggle
    `training_data/fold_*/{all,hem}`, plain `{all,hem}`), names ending `_all` / `_hem`, and the preliminary test
    set (`<folder>_labels.csv` with Patient_ID and new_names, beside its images or beside their folder; the final
    test set repeats the same new names, unlabelled). Subjects come from file names.

    Raises:
        DataError: no folder, no labelled images, one class only, names without subjects.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give the folder that holds the C-NMC cells.")
    renamed = _read_label_files(root)
    rows, nameless = [], []
    for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("._")):
        official = renamed.get((file.parent, file.name)) or renamed.get((file.parent.name, file.name), file.name)
        label = _label_of(official, file)
        if label is None:
            continue
        subject = subject_of(official)
        if subject is None:
            nameless.append(file)
            continue
        rows.append((file, label, subject))
    if nameless:
        raise DataError(
            f"{len(nameless)} labelled images carry no subject in their name (first: {nameless[0].name}). Rename them as "
            "UID_<subject>_<image>_<cell>_<all|hem>; without subjects, no figure on unseen persons can be given."
        )
    if not rows:
        raise DataError(f"{root} holds no labelled cells. Expected …/all/*.bmp and …/hem/*.bmp, or names ending _all, _hem.")
    files, labels, subjects = zip(*rows, strict=True)
    y_true = np.array(labels)
    if len(set(labels)) == 1:
        raise DataError(f"{root} holds only {'ALL' if labels[0] else 'HEM'} cells. Training needs both classes.")
    group_of = {subject: "+".join(sorted(group)) for group in SHARED_PICTURES for subject in group}
    groups = np.array([group_of.get(s, s) for s in subjects])
    return Cells(files=list(files), y_true=y_true, subjects=np.array(subjects), groups=groups)


def _label_of(official: str, file: Path) -> int | None:
    for text in (Path(official).stem.lower().rpartition("_")[2], file.parent.name.lower()):
        if text in ("all", "hem"):
            return int(text == "all")
    return None


def _read_label_files(root: Path) -> dict:
    """(folder or its name, new name) -> official name, from every preliminary-phase labels CSV below root."""
    renamed = {}
    for table in root.rglob("*labels*.csv"):
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            for row in csv.DictReader(file):
                if row.keys() >= {"Patient_ID", "new_names"}:
                    for folder in (table.parent, table.stem.removesuffix("_labels")):
                        renamed[(folder, row["new_names"])] = row["Patient_ID"]
    return renamed


def cell_label(file: Path) -> str:
    """`folder/file`: a cell's name in problems, wherever the data lies."""
    return f"{file.parent.name}/{file.name}"


def split_by_subject(cells: Cells, *, folds: int, seed: int) -> np.ndarray:
    """Fold number of every cell, int (n,). No group of subjects lies in two folds; classes are balanced over folds.

    Raises:
        DataError: a class has fewer subject groups than folds, or a fold would hold one class only.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    for value, label in ((1, "ALL"), (0, "HEM")):
        n = len(set(cells.groups[cells.y_true == value]))
        if n < folds:
            raise DataError(f"{folds} folds need at least {folds} groups of {label} subjects. Received: {n}")
    fold_of = np.empty(len(cells), "int64")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(cells.y_true, cells.y_true, cells.groups)):
        fold_of[held_out] = fold
        if len(set(cells.y_true[held_out])) < 2:
            raise DataError(f"Fold {fold} of {folds} got subjects of one class only. Use fewer folds or another seed.")
    return fold_of


def pack_cells(
    cells: Cells, framing: FrameSpec, *, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[np.ndarray, list[str]]:
    """Frame every cell as serving does, into one memory-mapped array that later runs reuse.

    Returns:
        uint8 (n, S, S, 3), read-only, and "folder/file: why" for each file that could not be read (its row is black).
    """
    key = hashlib.sha256(f"{cells.fingerprint} {framing}".encode()).hexdigest()[:16]
    array_file, problems_file = cache / f"{key}.npy", cache / f"{key}.txt"
    if not problems_file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        shape = (len(cells), framing.size, framing.size, 3)
        unfinished = cache / f"{key}.{os.getpid()}.partial"  # another run may be packing the same cells
        packed = np.lib.format.open_memmap(unfinished, mode="w+", dtype="uint8", shape=shape)
        problems = []

        def pack(i: int) -> None:
            file = cells.files[i]
            try:
                packed[i] = frame_cell(decode_image(file.read_bytes(), name=cell_label(file))[0], framing)
            except InputError as error:
                problems.append(str(error))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(pack, range(len(cells))), 1):
                progress(done, len(cells))
        packed.flush()
        unfinished.replace(array_file)
        problems_file.write_text("\n".join(sorted(problems)), "utf-8")  # last: its presence says the array is whole
    return np.load(array_file, mmap_mode="r"), problems_file.read_text("utf-8").splitlines()
