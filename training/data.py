"""A folder of C-NMC cells: index it, verify every picture, pack it into one array."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from inference.errors import ImageError, InputError
from inference.gate import MEASURES, inspect_cell
from inference.images import SUFFIXES, cell_hash, clean_name, decode_image, frame_cell, subject_of
from model_zoo import FrameSpec, runs_folder
from model_zoo._files import whole_file
from training.errors import DataError

IMAGE_SUFFIXES = {".png", ".webp", *SUFFIXES}
SUBJECTS_FILE = "subjects.csv"
# The official set holds the same picture under several subjects: each group stays on one side of a split.
SHARED_PICTURES = [{"20", "21"}, {"51", "75", "78"}, {"H2", "H4", "H5", "H6"}, {"H10", "H3"}]
CLASSES = ((1, "ALL"), (0, "HEM"))
_CHUNK = 256  # files in flight: what is read ahead of a slow disk stays small
_WHEN_LOST = "This cell could be read a moment ago. Check the disk or the network share, then start again."


@dataclass(frozen=True, kw_only=True)
class Cells:
    """An indexed folder; position i of every field is one cell.

    Attributes:
        files: paths.
        y_true: int (n,), 1 = ALL.
        subjects: str (n,), upper case.
        groups: str (n,), subjects that share a picture have one group.
        preliminary: bool (n,), cells of the official preliminary test set; None where there are none.
        unlabelled: images of the folder that are none of these cells: nothing tells whether they are ALL or HEM.
        digests: of each file's bytes, once `verify_cells` has read them.
        measures: float (n, 4), `inference.gate.MEASURES` of each cell; as `digests`.
        hashes: str (n,), `inference.images.cell_hash` of each; as `digests`.
    """

    files: list[Path]
    y_true: np.ndarray
    subjects: np.ndarray
    groups: np.ndarray
    preliminary: np.ndarray | None = None
    unlabelled: tuple[Path, ...] = ()
    digests: list[str] | None = None
    measures: np.ndarray | None = None
    hashes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.files)

    def choose(self, where: np.ndarray) -> Cells:
        """The cells at the chosen positions (bool (n,) or int), in that order."""
        rows = np.arange(len(self))[where]
        return Cells(
            files=[self.files[row] for row in rows],
            y_true=self.y_true[rows],
            subjects=self.subjects[rows],
            groups=self.groups[rows],
            preliminary=None if self.preliminary is None else self.preliminary[rows],
            unlabelled=self.unlabelled,
            digests=self.digests and [self.digests[row] for row in rows],
            measures=None if self.measures is None else self.measures[rows],
            hashes=None if self.hashes is None else self.hashes[rows],
        )

    def count(self, where: np.ndarray | None = None) -> dict:
        """Cells and subjects by class, of all or of the chosen positions (bool (n,) or int, each once)."""
        y, subjects = (self.y_true, self.subjects) if where is None else (self.y_true[where], self.subjects[where])
        return {
            f"{label}_{what}": int(n)
            for label, value in (("all", 1), ("hem", 0))
            for what, n in (("subjects", len(set(subjects[y == value]))), ("cells", (y == value).sum()))
        }

    def told(self, where: np.ndarray | None = None) -> str:
        """What `count` counts, in words."""
        n = self.count(where)
        hem = f"{n['hem_cells']:,} HEM cells of {n['hem_subjects']} subjects"
        return f"{n['all_cells']:,} ALL cells of {n['all_subjects']}, {hem}"

    @property
    def darkness(self) -> np.ndarray | None:
        """float (n,): optical density of each cell's mean colour; None before `verify_cells`."""
        return None if self.measures is None else self.measures[:, MEASURES.index("darkness")]

    @property
    def passed_over(self) -> str:
        """A sentence on the images without a label; "" where there are none."""
        if not self.unlabelled:
            return ""
        passed = _some([cell_label(file) for file in self.unlabelled], "without a label")
        return f"Passed over: {passed}. Its folder's name (all or hem), its own or subjects.csv would tell it."

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, subject, label and content of every file in order, wherever the folder lies and whatever it is
        called."""
        digests, top = self.digests or list(_in_threads(_digest, self.files)), _top(self.files)
        names = [file.name if file.parent == top else cell_label(file) for file in self.files]
        rows = zip(names, self.subjects, self.y_true, digests, strict=True)
        return hashlib.sha256("\n".join("\t".join(map(str, row)) for row in rows).encode()).hexdigest()


def index_cells(root: Path) -> Cells:
    """Index a folder of labelled cells by names and tables; no picture is opened. Links to folders are followed.

    Understands any tree whose images lie in folders `all` and `hem` (TCIA `fold_*/{all,hem}`, Kaggle
    `training_data/fold_*/{all,hem}`, plain `{all,hem}`) or in a folder a subject inside these, names ending `_all` / `_hem`,
    and the preliminary test set (`<folder>_labels.csv` with Patient_ID and new_names, beside its images or beside their
    folder; the final test set repeats the same new names, unlabelled). Subjects come from file names, else from the folder
    inside `all` or `hem`, or from `subjects.csv` in `root` with the columns file (path below `root`, or a name that occurs
    once), subject and, where folders and names do not tell it, label (all or hem). What is hidden (.name) is passed over.

    Raises:
        DataError: no folder, no labelled images, one class only, images without subjects, a table that does not
            match its images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give the folder that holds the C-NMC cells.")
    inside = _walk(root)
    files = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    tables = [p for p in inside if p.match("*labels*.csv")]
    listed = _read_subjects(root, files)
    renamed = _read_label_files([file for file in files if file not in listed], files, tables)
    rows, named, nameless, unlabelled = [], set(), [], []
    for file in files:
        official = renamed.get(file, file.name)
        subject, label = listed.get(file, (None, _label_of(official, file, root)))
        if label is None:
            unlabelled.append(file)
            continue
        if subject is None and (subject := subject_of(official)):
            named.add(subject)
        elif subject is None and not (subject := _folder_of(file, root)):
            nameless.append(file)
            continue
        rows.append((file, label, subject))
    if nameless:
        raise DataError(
            f"{len(nameless)} labelled images carry no subject in their name (first: {nameless[0].relative_to(root)}). "
            f"Put each subject's images into a folder of its own inside all or hem, or name their subjects in "
            f"{root / SUBJECTS_FILE}, a table with the columns file,subject and one line an image; without subjects, no "
            "figure on unseen persons can be given."
        )
    if not rows:
        raise DataError(
            f"{root} holds no labelled cells. Expected …/all/*.bmp and …/hem/*.bmp, names ending _all, _hem, or "
            f"{SUBJECTS_FILE} with the columns file,subject,label."
        )
    files, labels, subjects = zip(*rows, strict=True)
    if len(set(labels)) == 1:
        raise DataError(f"{root} holds only {'ALL' if labels[0] else 'HEM'} cells. Training needs both classes.")
    # Only C-NMC's own names: a laboratory's subjects 20 and 21 are two persons.
    group_of = {subject: "+".join(sorted(group)) for group in SHARED_PICTURES if group & named for subject in group}
    return Cells(
        files=list(files),
        y_true=np.array(labels),
        subjects=np.array(subjects),
        groups=np.array([group_of.get(s, s) for s in subjects]),
        preliminary=np.array([file in renamed for file in files]) if renamed else None,
        unlabelled=tuple(unlabelled),
    )


def _walk(root: Path) -> list[Path]:
    """Every file below `root`, sorted. Links are followed to folders that were not read yet, so that they may form a ring."""
    found, seen, tops = [], set(), [root]
    for top in tops:  # links come last: a folder below `root` is called by its own place
        for folder, inside, names in os.walk(top):
            if (real := os.path.realpath(folder)) in seen:
                inside.clear()
                continue
            seen.add(real)
            inside[:] = [name for name in inside if name != "__MACOSX" and not name.startswith(".")]  # thumbnails, waste bins
            found += [Path(folder, name) for name in names if not name.startswith(".")]
            tops += [link for name in sorted(inside) if (link := Path(folder, name)).is_symlink()]
    return sorted(found)


def _label_of(official: str, file: Path, root: Path) -> int | None:
    """What its name says, else the nearest folder below `root` that is called all or hem."""
    folders = (folder.name.lower() for folder in file.parents if folder != root and folder.is_relative_to(root))
    for text in (Path(official).stem.lower().rpartition("_")[2], *folders):
        if text in ("all", "hem"):
            return int(text == "all")
    return None


def _folder_of(file: Path, root: Path) -> str:
    """The subject whose folder lies between a folder all or hem and the file; "" where there is none."""
    subject = ""
    for folder in file.parents:
        if folder.name.lower() in ("all", "hem"):
            return subject and clean_name(subject).upper()
        if folder == root:
            break
        subject = folder.name
    return ""


def _read_table(table: Path) -> list[dict]:
    """Rows of a CSV, its columns apart by commas, semicolons (as Excel writes it in many countries) or tabs; what is no CSV has
    none. In UTF-8, UTF-16, or else in Latin-1, as older Excels write: no letter is lost, so no two names become one."""
    content = table.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = text.splitlines(keepends=True)
    if lines and lines[0].lower().startswith("sep="):  # a word to Excel
        del lines[0]
    try:
        delimiter = max(",;\t", key="".join(lines[:1]).count)
        return [row for row in csv.DictReader(lines, restval="", delimiter=delimiter) if any(row.values())]
    except csv.Error:
        return []


def _columns(rows: list[dict]) -> str:
    return ", ".join(map(str, rows[0])) if rows else "no rows"


def _read_label_files(unlisted: list[Path], files: list[Path], tables: list[Path]) -> dict[Path, str]:
    """Image -> official name, from every preliminary-phase labels CSV. One without its images is passed over.

    Raises:
        DataError: a CSV that names other images than its folder holds, contradicts itself, or lacks a column though a folder
            of images without labels has its name.
    """
    folders: dict[Path, dict[str, Path]] = {}
    for file in files:
        folders.setdefault(file.parent, {})[file.stem] = file  # by stem: cells may have been converted from BMP
    renamed = {}
    for table in tables:
        official, rows, of = {}, _read_table(table), table.stem.removesuffix("_labels")
        if not rows or not rows[0].keys() >= {"Patient_ID", "new_names"}:
            if any(file.parent.name == of and _label_of(file.name, file, file.parents[1]) is None for file in unlisted):
                raise DataError(f"{table} needs the columns Patient_ID,new_names and labels. Received: {_columns(rows)}")
            continue
        for row in rows:
            name = official[Path(row["new_names"]).stem] = row["Patient_ID"]
            label = _label_of(name, table, table.parents[1])
            if subject_of(name) is None or row.get("labels", str(label)) != str(label):
                raise DataError(
                    f"{table}: Patient_ID {name!r} and labels {row.get('labels')!r} do not fit. Expected "
                    "UID_<subject>_<image>_<cell>_all with 1, or …_hem with 0. Copy the table again from its source."
                )
        for folder, inside in folders.items():
            if folder != table.parent and folder.name != of:
                continue
            missing = sorted(official.keys() - inside.keys())
            if len(missing) == len(official):  # another folder's table
                continue
            extra = [file.name for stem, file in inside.items() if stem not in official and subject_of(file.name) is None]
            if missing or extra:
                raise DataError(
                    f"{table} does not match the images in {folder}: {_some(missing, 'missing')}, "
                    f"{_some(extra, 'not in the table')}. Copy both again from one source, or remove the table."
                )
            renamed |= {inside[stem]: name for stem, name in official.items()}
    return renamed


def _read_subjects(root: Path, files: list[Path]) -> dict[Path, tuple[str, int]]:
    """Image -> (subject, label), from subjects.csv; empty where there is none.

    Raises:
        DataError: a column or a value is missing, an image is not there or named twice, a label contradicts its folder.
    """
    table = root / SUBJECTS_FILE
    if not table.is_file():
        return {}
    rows = [{str(column).strip().lower(): value for column, value in row.items()} for row in _read_table(table)]
    if not rows or not rows[0].keys() >= {"file", "subject"}:
        raise DataError(
            f"{table} needs the columns file,subject (and label, if folders do not tell it). Received: {_columns(rows)}"
        )
    times = Counter(_composed(file.name) for file in files)
    by_name = {name: file for file in files if times[name := _composed(file.name)] == 1}
    by_name |= {_composed(file.relative_to(root).as_posix()): file for file in files}
    names = [_composed(row["file"].strip().replace("\\", "/")) for row in rows]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DataError(
            f"{table} does not match its images: {_some(missing, 'not found')}. "
            f"Give each path below {root}; the name alone does where it occurs once."
        )
    listed: dict[Path, tuple[str, int]] = {}
    for line, (name, row) in enumerate(zip(names, rows, strict=True), 2):
        file, subject, given = by_name[name], row["subject"].strip(), row.get("label", "").strip().lower()
        told = _label_of(file.name, file, root)
        label = {"all": 1, "1": 1, "hem": 0, "0": 0, "": told}.get(given)
        if not subject:
            wrong = "the subject is empty"
        elif label is None:
            wrong = f"neither folder nor name tells it, so a column label must say all or hem. Received: {given!r}"
        elif told not in (None, label):
            wrong = f"the label {given!r} contradicts the folder or name of the image"
        elif file in listed:
            wrong = "the image is named a second time"
        else:
            listed[file] = clean_name(subject).upper(), label
            continue
        raise DataError(f"{table}, line {line}, {name}: {wrong}")
    return listed


def _composed(name: str) -> str:
    """As tables are mostly typed: a macOS disk may hold ä as a with a mark."""
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str], how: str) -> str:
    first = f" (first: {names[0]})" if names else ""
    return f"{len(names):,} image{'' if len(names) == 1 else 's'} {how}{first}"


def cell_label(file: Path) -> str:
    """`folder/file`: a cell's name in problems, wherever the data lies."""
    return f"{file.parent.name}/{file.name}"


def name_cells(files: Sequence[Path], subjects: Sequence[str]) -> list[str]:
    """What tables call each cell: its file's name, or, where its subject has several of that name in whatever format, its path
    below the folder that holds all files."""
    counts, top = Counter(zip(subjects, (file.stem for file in files), strict=True)), _top(files)
    return [
        file.name if counts[subject, file.stem] == 1 else file.relative_to(top).as_posix()
        for subject, file in zip(subjects, files, strict=True)
    ]


def _top(files: Sequence[Path]) -> Path:
    """The folder that holds all of them."""
    return Path(os.path.commonpath([file.parent for file in files]) if files else "")


def cache_folder() -> Path:
    """Where runs keep verified and packed cells, by content: beside the runs."""
    return runs_folder() / "cache"


def verify_cells(
    cells: Cells, *, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Cells, list[str]]:
    """Read every picture: leave out the unreadable ones and those without a segmented cell, and make one group of subjects that
    share a picture.

    A picture is shared where the cell's pixels are equal, whatever the files' format or the black around it. What was found is
    kept in `cache` under the files' content: a second call only reads their bytes.

    Args:
        cells: as indexed.
        cache: folder, made where there is none.
        progress: called with (done, total) while pictures are decoded.
    Returns:
        The readable cells, in order, and sentences on what was found; none for an ordinary folder.
    Raises:
        DataError: a class without a readable image, or the cache cannot be written.
    """
    cells = replace(cells, digests=cells.digests or list(_in_threads(_digest, cells.files)))
    found_file = Path(cache) / f"{cells.fingerprint[:16]}.cells.json"
    if not found_file.exists():
        found = []
        for entry in _in_threads(_inspect, list(zip(cells.files, cells.digests, strict=True))):
            found.append(entry)
            progress(len(found), len(cells))
        with _cache_file(found_file, "what was found in the pictures") as file:
            file.write(json.dumps(found).encode())
    columns = zip(*json.loads(found_file.read_text("utf-8")), strict=True)
    hashes, sizes, reasons, grey, measures = (np.array(column) for column in columns)
    readable = hashes != ""
    lost = reasons[~readable].tolist()
    sentences = [cells.passed_over] if cells.unlabelled else []
    cells, sizes = replace(cells, measures=measures, hashes=hashes).choose(readable), Counter(sizes[readable].tolist())
    for value, label in CLASSES:
        if not (cells.y_true == value).any():
            raise DataError(f"No {label} image could be read{f'. First: {lost[0]}' if lost else '.'}")
    if len(sizes) > 1:
        usual = ", ".join(f"{size} ({n:,})" for size, n in sizes.most_common(3))
        sentences.append(
            f"Images of {len(sizes)} sizes, mostly {usual}. Cells are cropped at native scale: all need one magnification."
        )
    if grey.any():
        named = [cell_label(cells.files[row]) for row in np.flatnonzero(grey[readable])]
        sentences.append(f"{_some(named, 'in grey')}: what is learnt from them does not hold for stained cells.")
    cells, told = join_copies(cells)
    sentences += told
    if lost:  # last, as it may be a long list
        sentences += [f"{len(lost):,} of {len(readable):,} images cannot be read as cells and are left out:", *lost]
    return cells, sentences


def join_copies(cells: Cells) -> tuple[Cells, list[str]]:
    """The cells, which have their hashes, with subjects that share a picture as one group, and sentences on all copies."""
    copies = _copies(cells.hashes)
    groups = _join_groups(cells.groups, copies)
    return replace(cells, groups=groups), _describe_copies(cells, groups, copies)


def usual_ranges(cells: Cells) -> dict[str, dict[str, list[float]]]:
    """What a network trained on these cells knows of each of MEASURES: {"cell": [low, high], "person": [low, high]} of each.

    Of a cell: all but a thousandth. Of a person's median: from the lowest to the highest, and the more beyond the fewer persons
    there are, a sixth of that range for 50: none of C-NMC's 50 then lies outside what the other 49 allow (docs/decisions/0019).
    """
    persons = np.stack([np.median(cells.measures[cells.subjects == s], axis=0) for s in sorted(set(cells.subjects))])
    low, high = persons.min(axis=0), persons.max(axis=0)
    beyond = 1.2 / np.sqrt(len(persons)) * (high - low)
    limits = {"cell": np.percentile(cells.measures, [0.05, 99.95], axis=0), "person": np.stack([low - beyond, high + beyond])}
    return {name: {of: limits[of][:, i].round(4).tolist() for of in limits} for i, name in enumerate(MEASURES)}


def _copies(hashes: np.ndarray) -> list[list[int]]:
    """Positions of every picture that occurs more than once."""
    rows: dict[str, list[int]] = {}
    for row, picture in enumerate(hashes.tolist()):
        rows.setdefault(picture, []).append(row)
    return [same for same in rows.values() if len(same) > 1]


def _join_groups(groups: np.ndarray, copies: list[list[int]]) -> np.ndarray:
    """Groups of which two hold a copy of one picture become one; the others keep their names."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, index = np.unique(groups, return_inverse=True)
    pairs = np.array([(index[same[0]], index[row]) for same in copies for row in same[1:]], "int64").reshape(-1, 2)
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(names), len(names)))
    component = connected_components(links, directed=False)[1]
    return np.array(["+".join(names[component == c]) for c in component])[index]


def _describe_copies(cells: Cells, groups: np.ndarray, copies: list[list[int]]) -> list[str]:
    def such(pictures):
        return " = ".join(cell_label(cells.files[row]) for row in pictures[0])

    sentences = []
    for group in sorted(set(groups) - set(cells.groups)):
        here = [same for same in copies if groups[same[0]] == group and len(set(cells.groups[same])) > 1]
        subjects = ", ".join(sorted(set(cells.subjects[groups == group])))
        sentences.append(f"Subjects {subjects} share {len(here):,} picture(s), such as {such(here)}: they are one group.")
    if both := [same for same in copies if len(set(cells.y_true[same])) > 1]:
        sentences.append(f"{len(both):,} picture(s) carry both labels, such as {such(both)}: correct or remove one of the two.")
    if again := [same for same in copies if len(set(cells.subjects[same])) < len(same)]:
        sentences.append(
            f"{len(again):,} picture(s) occur again in one subject, such as {such(again)}: each copy counts as a cell."
        )
    if mixed := sorted(set(cells.subjects[cells.y_true == 1]) & set(cells.subjects[cells.y_true == 0])):
        sentences.append(
            f"Cells of both classes in subject(s) {', '.join(mixed)}: figures by subject take each to be of one class."
        )
    return sentences


def pack_cells(
    cells: Cells, framing: FrameSpec, *, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """Frame every cell as serving does, into one memory-mapped array that later runs on the same content reuse.

    Returns:
        uint8 (n, S, S, 3), read-only.
    Raises:
        DataError: a cell cannot be read, the cache cannot be written, or the disk is full; nothing half-written stays.
    """
    shape = (len(cells), framing.size, framing.size, 3)
    key = hashlib.sha256(f"{cells.fingerprint} {framing} {_framing_print(framing)}".encode()).hexdigest()[:16]
    array_file = Path(cache) / f"{key}.npy"
    if not array_file.exists():

        def frame(file: Path) -> np.ndarray:
            try:
                return frame_cell(_decode(file), framing)
            except InputError as error:  # a black cell in its place would be trained on
                raise DataError(f"{error} {_WHEN_LOST}") from error
            except OSError as error:
                raise DataError(f"{cell_label(file)}: {error.strerror}. {_WHEN_LOST}") from error

        with _cache_file(array_file, f"{len(cells):,} framed cells ({np.prod(shape) / 1e9:.1f} GB)") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for done, framed in enumerate(_in_threads(frame, cells.files), 1):
                file.write(framed.tobytes())
                progress(done, len(cells))
    return np.load(array_file, mmap_mode="r")


def _framing_print(framing: FrameSpec) -> str:
    """Changes when the framing's code or its libraries give other pixels: what was packed before them is stale."""
    y, x = np.mgrid[:450, :450]
    disc = (x - 210) ** 2 + (y - 240) ** 2 < 90**2
    picture = np.stack([disc * (20 + (x * y * k) % 230) for k in (1, 2, 3)], axis=-1).astype("uint8")
    return hashlib.sha256(frame_cell(picture, framing).tobytes()).hexdigest()


def _decode(file: Path) -> np.ndarray:
    """uint8 (H, W, 3), or InputError, or OSError."""
    return decode_image(file.read_bytes(), name=cell_label(file))[0]


def _digest(file: Path) -> str:
    """BLAKE2 of a file's bytes; "" for one that cannot be read."""
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""


def _inspect(entry: tuple[Path, str]) -> tuple[str, str, str, bool, list[float]]:
    """Of a file and its digest: `cell_hash` ("" if there is no cell), size, why it cannot be read, whether it is grey, and
    MEASURES."""
    (file, digest), nothing = entry, [0.0] * len(MEASURES)
    try:
        image = _decode(file)
    except InputError as error:
        return "", "", str(error), False, nothing
    except OSError as error:
        if digest:  # what is found now would be kept as if it were the file's
            raise DataError(f"{cell_label(file)}: {error.strerror}. {_WHEN_LOST}") from error
        return "", "", str(ImageError(cell_label(file), f"the file cannot be read ({error.strerror}).")), False, nothing
    quality = inspect_cell(image)
    if quality.kind == "refused":  # as it would be where cells are read
        return "", "", str(ImageError(cell_label(file), quality.reasons[0])), False, nothing
    size = "{1} × {0}".format(*image.shape)
    measures, grey = [round(value, 5) for value in quality.measures], bool((image == image[..., :1]).all())
    return cell_hash(image, box=quality.box), size, "", grey, measures


def _in_threads(function: Callable, items: Sequence) -> Iterator:
    """Results in order; decoding and hashing release the interpreter's lock."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(function, items[start : start + _CHUNK])
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cache_file(path: Path, what: str):
    """A binary file of the cache, which other runs may be writing too; DataError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.partial"):  # by a killed run: a living one writes all the time
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        with whole_file(path, f".{os.getpid()}") as unfinished, unfinished.open("wb") as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot take {what}: {error.strerror}. Free space, or use a folder you may write to."
        ) from error
