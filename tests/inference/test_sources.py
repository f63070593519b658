import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from inference.errors import ArchiveError, ImageError, InputError
from inference.images import patient_of
from inference.sources import MAX_ENTRIES, open_files, open_paths


def pack(entries, *, method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return buffer.getvalue()


def patch_directory(data: bytes, offset: int, code: str, value: int) -> bytes:
    """Overwrite a field in every entry of the ZIP's central directory."""
    data, at = bytearray(data), data.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into(code, data, at + offset, value)
        at = data.find(b"PK\x01\x02", at + 4)
    return bytes(data)


def read_all(data: bytes, name="P7.zip") -> dict:
    """Name -> bytes, or the refusal's sentence."""
    return {source.name: read(source) for source in open_files([(name, lambda: data)])}


def read(source):
    try:
        return source.read()
    except InputError as error:
        assert error.sentence.strip() and source.name in str(error)
        return error.sentence


def test_zip_entries_are_named_below_the_archive_and_read():
    assert read_all(pack([("a.png", b"1"), ("deep/b.png", b"2")])) == {"P7/a.png": b"1", "P7/deep/b.png": b"2"}


@pytest.mark.parametrize(
    "evil", ["../evil.png", "deep/../../evil.png", "/etc/evil.png", "..\\evil.png", "\\evil.png", "C:\\evil.png"]
)
def test_path_out_of_the_zip_is_refused_and_the_rest_is_read(evil):
    found = read_all(pack([("a.png", b"1"), (evil, b"2"), ("z.png", b"3")]))
    assert found.pop("P7/a.png") == b"1" and found.pop("P7/z.png") == b"3"
    (sentence,) = found.values()
    assert "outside" in sentence


@pytest.mark.parametrize("name", ["a..b.png", "P1:a.png", "P:a.png"])
def test_dots_and_colons_inside_a_name_are_no_way_out(name):
    assert read_all(pack([(name, b"1")])) == {f"P7/{name}": b"1"}


def test_zip_in_a_zip_is_not_opened():
    found = read_all(pack([("inner.zip", pack([("a.png", b"1")])), ("b.png", b"2")]))
    assert "inside" in found["P7/inner.zip"] and found["P7/b.png"] == b"2"


def test_link_is_refused():
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    found = read_all(pack([(link, b"/etc/passwd"), ("b.png", b"2")]))
    assert "link" in found["P7/link.png"] and found["P7/b.png"] == b"2"


def test_encrypted_entry_is_refused():
    found = read_all(patch_directory(pack([("a.png", b"1")]), 8, "<H", 1))
    assert "password" in found["P7/a.png"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_entry_is_refused_and_the_rest_is_read(method):
    body = bytes(range(256)) * 8
    data = bytearray(pack([("a.png", body), ("b.png", b"2")], method=method))
    data[data.find(b"a.png") + 5 + 20] ^= 0xFF
    found = read_all(bytes(data))
    assert "damaged" in found["P7/a.png"] and found["P7/b.png"] == b"2"


def test_entry_that_is_larger_than_it_says_is_refused():
    bomb = pack([("a.png", b"x" * 50_000_000)], method=zipfile.ZIP_DEFLATED)
    assert "damaged" in read_all(patch_directory(bomb, 24, "<I", 10))["P7/a.png"]


def test_entry_that_would_expand_far_is_refused_unread():
    found = read_all(patch_directory(pack([("a.png", b"1")]), 24, "<I", 2_000_000_000))
    assert "210 MB" in found["P7/a.png"]


def test_zip_of_10_gb_is_refused_whole():
    found = read_all(patch_directory(pack([("a.png", b"1"), ("b.png", b"2"), ("c.png", b"3")]), 24, "<I", 4_000_000_000))
    assert list(found) == ["P7.zip"] and "12.0 GB" in found["P7.zip"]


def test_entry_count_is_limited():
    entries = [(f"{i}.png", b"") for i in range(MAX_ENTRIES + 1)]
    assert len(list(open_files([("P7.zip", lambda: pack(entries[:-1]))]))) == MAX_ENTRIES
    found = read_all(pack(entries))
    assert list(found) == ["P7.zip"] and "20,001" in found["P7.zip"]


def test_empty_zip_says_so():
    assert "empty" in read_all(pack([]))["P7.zip"]
    assert "empty" in read_all(pack([("only a folder/", b"")]))["P7.zip"]


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 60, pack([("a.png", b"1" * 500)])[:-30]])
def test_what_is_no_zip_is_one_refusal(data):
    found = read_all(data)
    assert list(found) == ["P7.zip"] and "ZIP" in found["P7.zip"]


def test_litter_is_left_out():
    litter = ["__MACOSX/a.png", ".DS_Store", "deep/Thumbs.db", "._a.png", "desktop.ini"]
    assert list(read_all(pack([(name, b"") for name in [*litter, "a.png"]]))) == ["P7/a.png"]
    assert [s.name for s in open_files((name, lambda: b"") for name in [*litter, "b.png"])] == ["b.png"]


def test_names_are_cleaned_but_entries_found():
    assert read_all(pack([("a\u202eb.png", b"1")])) == {"P7/ab.png": b"1"}


def test_bad_zip_does_not_end_the_batch():
    sources = list(open_files([("a.png", lambda: b"1"), ("bad.zip", lambda: b"?"), ("z.png", lambda: b"3")]))
    assert [s.name for s in sources] == ["a.png", "bad.zip", "z.png"]
    assert [read(s) for s in sources][::2] == [b"1", b"3"]


def test_sources_open_lazily():
    def never():
        raise AssertionError("read too early")

    sources = open_files([("a.png", lambda: b"1"), ("b.zip", never), ("c.png", never)])
    assert next(sources).read() == b"1"


def test_refusals_are_of_their_kind():
    (source,) = open_files([("bad.zip", lambda: b"?")])
    with pytest.raises(ArchiveError, match=r"bad\.zip"):
        source.read()


def test_folder_is_walked_in_name_order_with_the_folders_in_the_names(tmp_path):
    for name in ("p2/b.png", "p2/a.png", "p1/c.png"):
        (tmp_path / "case" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "case" / name).write_bytes(name.encode())
    (tmp_path / "case" / "p3.zip").write_bytes(pack([("d.png", b"4")]))
    found = {s.name: s.read() for s in open_paths([tmp_path / "case"])}
    assert list(found) == ["case/p1/c.png", "case/p2/a.png", "case/p2/b.png", "case/p3/d.png"]
    assert found["case/p2/a.png"] == b"p2/a.png"


def test_zips_and_folders_of_one_name_stay_apart(tmp_path, monkeypatch):
    """Each patient's `cells`, in a folder of her own, however they are given."""
    for patient in ("Anna", "Berta"):
        (tmp_path / "study" / patient / "cells").mkdir(parents=True)
        (tmp_path / "study" / patient / "cells.zip").write_bytes(pack([("1.png", b"1")]))
        (tmp_path / "study" / patient / "cells" / "2.png").write_bytes(b"2")
    found = {patient_of(s.name) for s in open_paths([tmp_path / "study"])}
    assert found == {"study / Anna / cells", "study / Berta / cells"}
    for given in ("cells.zip", "cells", "cells/2.png"):
        found = {patient_of(s.name) for s in open_paths(tmp_path / "study" / patient / given for patient in ("Anna", "Berta"))}
        assert found == {"Anna / cells", "Berta / cells"}
    assert [s.name for s in open_paths([tmp_path / "study" / "Anna" / "cells" / "2.png"])] == ["2.png"]
    monkeypatch.chdir(tmp_path / "study" / "Anna" / "cells")
    found = {patient_of(s.name) for s in open_paths([Path("."), Path("../../Berta/cells")])}
    assert found == {"Anna / cells", "Berta / cells"}


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond" / "more.png").write_bytes(b"secret")
    inside = tmp_path / "case"
    inside.mkdir()
    (inside / "a.png").write_bytes(b"1")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "folder").symlink_to(tmp_path / "beyond")
    (inside / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert {s.name: s.read() for s in open_paths([inside])} == {"case/a.png": b"1"}


def test_the_table_being_written_is_no_input(tmp_path):
    for name in ("a.png", "out.csv"):
        (tmp_path / name).write_bytes(b"1")
    assert [s.name for s in open_paths([tmp_path], skip=tmp_path / "out.csv")] == [f"{tmp_path.name}/a.png"]


def test_file_that_vanished_is_a_refusal(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    (source,) = open_paths([file])
    file.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        source.read()
