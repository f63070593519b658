import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from inference.cells import score_file, score_files
from inference.engine import WORKERS, Engine
from inference.images import decode_image, frame_cell
from inference.patients import carries_weight
from inference.sources import Source, open_files
from model_zoo import Card, load_checkpoint


@pytest.fixture(scope="module")
def files(draw_cell, encode):
    """Twelve good cells of two patients, and what else lies in a folder."""
    cells = [
        (f"P{1 + i % 2}/cell {i:02d}.png", encode(draw_cell(i, axes=(110 + 8 * i, 150)), "PNG", compress_level=1))
        for i in range(12)
    ]
    bad = [
        ("P1/notes.txt", b"seen on Monday"),
        ("P2/blank.bmp", encode(np.zeros((90, 90, 3), "uint8"), "BMP")),
        ("P1/cut.png", cells[0][1][:900]),
    ]
    return [*cells[:4], bad[0], *cells[4:8], bad[1], *cells[8:], bad[2]]


def sources(files):
    return open_files((name, lambda d=data: d) for name, data in files)


def test_every_file_has_its_row_in_order(files, tiny_engine):
    rows = list(score_files(sources(files), tiny_engine))
    assert [row.file for row in rows] == [name for name, _ in files]
    assert [row.patient for row in rows] == [name[:2] for name, _ in files]
    assert {row.file for row in rows if row.call == "refused"} == {"P1/notes.txt", "P2/blank.bmp", "P1/cut.png"}
    assert all((row.p_all is None) == (row.call == "refused") for row in rows)
    assert all(row.note for row in rows if row.call == "refused")
    assert {row.call for row in rows} == {"ALL", "HEM", "refused"}


def test_rows_are_what_the_engine_says_of_the_framed_cell(files, tiny_engine):
    for row, (name, data) in zip(score_files(sources(files), tiny_engine), files, strict=True):
        if row.call != "refused":
            framed = frame_cell(decode_image(data, name=name)[0], tiny_engine.card.framing)
            assert row.p_all == tiny_engine.predict(framed[None])[0][0]
            assert row.call == ("ALL" if row.p_all >= tiny_engine.card.threshold else "HEM")


def test_notes_of_decoding_and_gate_are_both_told(draw_cell, encode, tiny_engine):
    data = encode(draw_cell(centre=(60, 225)), "PNG")
    row = score_file(Source(name="cell.bmp", read=lambda: data), tiny_engine)
    assert "PNG" in row.note and "edge" in row.note and row.p_all is not None


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [("cell.jfif", "JPEG", ""), ("cell.dib", "BMP", ""), ("cell", "PNG", ""), ("cell.png", "BMP", "the content is BMP")],
)
def test_a_file_without_or_with_an_uncommon_suffix_is_no_matter(name, kind, note, draw_cell, encode, tiny_engine):
    data = encode(draw_cell(), kind)
    row = score_file(Source(name=name, read=lambda: data), tiny_engine)
    assert note in row.note and ("the content is" in row.note) == bool(note)
    assert not carries_weight(row.note)


def test_a_cell_that_trained_the_network_is_told_under_any_name(files, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    first, second, third, *_ = score_files(sources(files), Engine(load_checkpoint(folder)))
    assert not first.trained and first.told == first.note
    (folder / "trained_on.txt").write_text(f"{first.hash}\n{second.hash}\n")
    (folder / "predictions.csv").write_text(f"cell_hash,p_all,threshold\n{second.hash},0.25,0.2\n")
    card = Card.read(folder / "card.json")
    replace(card, training=card.training | {"networks": 2}).write(folder / "card.json")
    engine = Engine(load_checkpoint(folder))
    renamed = [("other.png", files[0][1]), ("x/1.png", files[1][1]), files[2]]
    found = list(score_files(sources(renamed), engine))
    assert [(row.trained, row.held_out) for row in found] == [(True, None), (True, (0.25, True)), (False, None)]
    assert [row.p_all for row in found] == [first.p_all, second.p_all, third.p_all]
    assert found[0].told.endswith("its P(ALL) says nothing of new patients")
    assert found[1].told.endswith("; when held out, it read 0.250") and found[2].told == third.note
    assert not any(carries_weight(row.note) for row in found)  # it is no fault of the picture
    assert replace(found[0], p_all=None).told == found[0].note  # a refused row has no P(ALL) to speak of


def test_an_error_of_any_kind_is_a_row_and_the_rest_goes_on(files, tiny_engine):
    good = [file for file in files if "cell" in file[0]]

    def read():
        raise MemoryError

    rows = list(score_files([*sources(good[:2]), Source(name="P3/large.png", read=read), *sources(good[2:])], tiny_engine))
    assert [(row.file, row.note) for row in rows if row.p_all is None] == [
        ("P3/large.png", "it could not be scored (MemoryError). Add it again.")
    ]
    assert len(rows) == len(good) + 1


def test_keep_sees_the_decoded_cell_and_only_of_scored_files(files, tiny_engine):
    rows = list(score_files(sources(files), tiny_engine, keep=lambda image, box: image.shape))
    assert [row.kept for row in rows] == [None if row.call == "refused" else (450, 450, 3) for row in rows]


def counting(items, taken):
    for item in items:
        taken.append(item)
        yield item


def test_only_a_few_files_are_taken_ahead(files, tiny_engine):
    taken = []
    stream = score_files(counting(sources(files * 4), taken), tiny_engine)
    for given in range(1, 20):
        next(stream)
        assert len(taken) <= given + 2 * WORKERS
    stream.close()


def test_leaving_early_ends_the_work(files, tiny_engine):
    taken, before = [], threading.active_count()
    stream = score_files(counting(sources(files * 4), taken), tiny_engine)
    next(stream)
    stream.close()
    assert len(taken) <= 1 + 2 * WORKERS and threading.active_count() == before


def test_no_files_give_no_rows(tiny_engine):
    assert list(score_files([], tiny_engine)) == []


def test_two_sessions_at_once_get_the_answers_of_one(files, tiny_engine):
    alone = list(score_files(sources(files), tiny_engine))
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: list(score_files(sources(files), tiny_engine)), range(2)))
    assert both == [alone, alone]
