"""What a user gives (files, folders, ZIPs) as a stream of named images. Nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from inference.errors import ArchiveError, ImageError, InputError
from inference.images import clean_name

MAX_ENTRIES = 20_000
MAX_ENTRY_BYTES = 210_000_000  # 25 megapixels of four 16-bit channels, and a little
MAX_ARCHIVE_BYTES = 8_000_000_000
_LITTER = {".ds_store", "thumbs.db", "desktop.ini"}  # what operating systems leave in folders


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file to score.

    Attributes:
        name: path as given, cleaned for showing; its folders tell the patient.
        read: returns the bytes, or raises `InputError`.
    """

    name: str
    read: Callable[[], bytes]


def open_files(files: Iterable[tuple[str, Callable[[], bytes] | Path]]) -> Iterator[Source]:
    """Sources of (name, reader or path) pairs; a ZIP gives one for each entry, lazily.

    A ZIP that is refused as a whole gives a single source whose `read` raises the reason: one bad file
    never ends the batch.
    """
    for name, content in files:
        shown = clean_name(name)
        if _is_litter(shown):
            continue
        if shown.lower().endswith(".zip"):
            yield from _open_zip(shown, content)
        else:
            yield Source(name=shown, read=(lambda c=content, n=shown: _read(c, n)))


def open_paths(paths: Iterable[Path], *, skip: Path | None = None) -> Iterator[Source]:
    """Sources of files and folders on this machine; folders are walked in name order, links are not followed out.

    Named from the folder that holds them all: `Anna/cells` and `Berta/cells` are two patients.

    Args:
        paths: files and folders.
        skip: a file inside them that is no input, as the table being written.
    """
    paths = [Path(os.path.abspath(path)) for path in paths]  # without "..", and links as they are called
    above = os.path.commonpath([path.parent for path in paths]) if paths else ""
    for path in paths:
        name = path.relative_to(above)
        if path.is_dir():
            top, skipped = path.resolve(), skip and skip.resolve()
            real = ((p, p.resolve()) for p in sorted(path.rglob("*")) if p.is_file())
            inside = [p.relative_to(path) for p, r in real if r.is_relative_to(top) and r != skipped]
            yield from open_files(((name / p).as_posix(), path / p) for p in inside)
        else:
            yield from open_files([(name.as_posix(), path)])


def _read(content: Callable[[], bytes] | Path, name: str) -> bytes:
    if not isinstance(content, Path):
        return content()
    try:
        if content.stat().st_size > MAX_ENTRY_BYTES:
            raise ImageError(name, f"the file is over {MAX_ENTRY_BYTES // 1_000_000} MB. Crop the single cells first.")
        return content.read_bytes()
    except OSError as error:
        raise ImageError(name, f"the file cannot be read ({error.strerror}).") from None


def _open_zip(name: str, content: Callable[[], bytes] | Path) -> Iterator[Source]:
    try:
        file = content if isinstance(content, Path) else io.BytesIO(content())
        archive = zipfile.ZipFile(file)
        entries = [e for e in archive.infolist() if not e.is_dir()]
        _check_archive(name, entries)
    except InputError as error:
        yield _refusal(name, error)
        return
    except Exception:  # zipfile raises many kinds on hostile bytes
        yield _refusal(name, ArchiveError(name, "not a readable ZIP, or damaged. Make the archive again."))
        return
    top = PurePosixPath(name).with_suffix("")
    named = [(entry, clean_name(f"{top}/{entry.filename}")) for entry in entries]
    named = [(entry, shown) for entry, shown in named if not _is_litter(shown)]
    if not named:
        yield _refusal(name, ArchiveError(name, "the ZIP holds no images, only an operating system's own files."))
    for entry, shown in named:
        yield Source(name=shown, read=lambda e=entry, n=shown: _read_entry(archive, e, n))


def _check_archive(name: str, entries: list[zipfile.ZipInfo]) -> None:
    if not entries:
        raise ArchiveError(name, "the ZIP is empty.")
    if len(entries) > MAX_ENTRIES:
        raise ArchiveError(name, f"{len(entries):,} files are over the limit of {MAX_ENTRIES:,}. Split the ZIP by patient.")
    total = sum(e.file_size for e in entries)
    if total > MAX_ARCHIVE_BYTES:
        raise ArchiveError(
            name,
            f"it would expand to {total / 1e9:.1f} GB; the limit is {MAX_ARCHIVE_BYTES // 10**9} GB. Split the ZIP by patient.",
        )


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> bytes:
    parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
    if ".." in parts or entry.filename.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", entry.filename):
        raise ArchiveError(name, "its path points outside the ZIP, so it was not opened. Make the archive again.")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise ArchiveError(name, "a link, not a file. Pack the image itself.")
    if entry.filename.lower().endswith(".zip"):
        raise ArchiveError(name, "a ZIP inside the ZIP is not opened. Unpack it and add its images.")
    if entry.flag_bits & 1:
        raise ArchiveError(name, "encrypted. Make the archive again without a password.")
    if entry.file_size > MAX_ENTRY_BYTES:
        raise ArchiveError(name, f"it would expand to over {MAX_ENTRY_BYTES // 1_000_000} MB. Crop the single cells first.")
    try:
        with archive.open(entry) as file:
            data = file.read(MAX_ENTRY_BYTES + 1)  # the declared size may lie
    except Exception:  # CRC, compression method, truncation: each raises its own kind
        raise ArchiveError(name, "this entry of the ZIP is damaged. Make the archive again.") from None
    if len(data) > MAX_ENTRY_BYTES:
        raise ArchiveError(name, f"it expands to over {MAX_ENTRY_BYTES // 1_000_000} MB. Crop the single cells first.")
    return data


def _refusal(name: str, error: InputError) -> Source:
    def read() -> bytes:
        raise error

    return Source(name=name, read=read)


def _is_litter(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.lower() in _LITTER or path.name.startswith("._") or "__MACOSX" in path.parts
