"""Parts of screens that several pages share."""

from __future__ import annotations

import contextlib
import csv
import html
import io
from collections import Counter
from dataclasses import replace

import numpy as np
import streamlit as st
from PIL import Image

from inference.cells import CellResult, probability
from inference.engine import Engine
from inference.patients import PatientSummary, carries_weight, summarize_patient
from inference.table import COLUMNS, MADE_BY, csv_row, inert
from model_zoo import BlastoscopeError, Card
from training.metrics import PAIRED
from training.results import cost, tested_on, with_interval
from ui import figures, resources, state
from ui.state import Patient

INTENDED_USE = "Research and education — not a medical device."
PERSONS_DIFFER = "The interval allows for how much persons differ."
IN_TRAINING = (
    " In training: cells that took part in the network's training; its answer on them says nothing of new patients. Held out: "
    "how they were called when the person was held out of it."
)
CAVEATS = "Of the cells supplied; not a marrow differential. Flow cytometry decides."


def header() -> None:
    """The quiet line that stands on every screen."""
    if st.context.theme.type == "dark":  # Streamlit writes white on the light accent, at 2.3 to 1
        st.html("<style>[data-testid=stBaseButton-primary]:not(:disabled) { color: #111317 !important }</style>")
    st.caption(f"{INTENDED_USE} Reads single, segmented white blood cells: ALL blasts against healthy B-lymphoid precursors.")


@contextlib.contextmanager
def said():
    """What cannot be done is said in a sentence, and the page goes on."""
    try:
        yield
    except BlastoscopeError as error:
        st.warning(plain(str(error)), icon=None)


def choose_checkpoint() -> Card:
    """Select box of bundled checkpoints; a change has the case scored again."""
    name = st.selectbox(
        "Network",
        [card.name for card in resources.cards()],
        format_func=lambda n: resources.card(n).title,
        **state.network_box(),
    )
    card = resources.card(name)
    st.caption(f"AUROC {with_interval(card.metrics['auroc'])} on {tested_on(card, 'subjects')}")
    return card


def choose_member(card: Card) -> Card:
    """Select box of an ensemble's networks; any other checkpoint is its own only network."""
    if not card.members:
        return card
    name = st.selectbox("Member of the ensemble", card.members, format_func=lambda n: resources.card(n).title)
    return resources.card(name)


def layers_in_words(layers: list[str]) -> str:
    """Of one network "layer `a`"; of an ensemble "layers `a`, `b`, the mean over the ensemble's networks"."""
    if len(layers) == 1:
        return f"layer `{layers[0]}`"
    return f"layers {', '.join(f'`{layer}`' for layer in layers)}, the mean over the ensemble's networks"


def sizes_in_words(cards: list[Card]) -> str:
    """Of one "the network: 96 × 96 px"; of several "the networks: 96 × 96 and 192 × 192 px; the smaller is shown"."""
    sizes = sorted({card.framing.size for card in cards})
    told = " and ".join(f"{size} × {size}" for size in sizes)
    return f"the network{'s' if len(cards) > 1 else ''}: {told} px{'; the smaller is shown' if len(sizes) > 1 else ''}"


def choose_rotations(card: Card) -> None:
    """Check box: average each cell over 8 rotations; a change has the case scored again."""
    st.checkbox(
        "Average over 8 rotations: slower, steadier",
        help="The network reads every cell eight times, turned by 45° each time, and the mean of its logits counts "
        "(paper 002). Takes eight times as long.",
        **state.rotations_box(card.rotations),
    )
    rotations_remark()


def rotations_remark() -> None:
    """A line where P(ALL) was not read in the way the card's figures were measured."""
    case = state.case()
    if case.rotations and (remark := case.engine().remark):
        st.caption(f"{remark}.")


def how_it_reads() -> None:
    """The empty Case page: what to drop, and what comes back."""
    st.space("small")
    for column, (title, text) in zip(
        st.columns(3, gap="large"),
        {
            "What to drop": "One white blood cell a file, cut out on black as in C-NMC (BMP, PNG, WebP, JPEG, TIFF). "
            "Several cells, a folder, or a ZIP; subfolders and C-NMC names become patients.",
            "What you get": "P(ALL), the network's probability that a cell is an ALL blast, of every cell, sorted in a "
            "gallery. For each patient the share of cells called ALL, "
            "with its interval and a careful answer. A CSV of it all. Click a cell to see where the network looked.",
            "What stays here": "Images are read on the machine that runs this app and go nowhere else. They are deleted by "
            "New case, and within minutes after this tab is closed; reloading it begins a new case. "
            "Files that are no segmented cell are refused, with the reason.",
        }.items(),
        strict=True,
    ):
        column.markdown(f"##### {title}")
        column.markdown(text)


def no_cell_yet() -> None:
    """What a page shows before there is a cell, and the way there."""
    st.info("No cell is open yet. Drop cells on the Case page, or try the synthetic demo patients.", icon=None)
    if st.button("Try the demo patients", type="primary"):
        state.case().add_demo()
        st.switch_page("pages/case.py")
    st.stop()


def pick_cell() -> CellResult:
    """The open cell, with a way to the next; stops the page when there is none."""
    case = state.case()
    if case.waiting:
        case.advance(first=state.selected_number())
    cell = state.selected()
    if cell is None:
        no_cell_yet()
    cells = {c.kept.number: c for c in sorted(case.scored, key=lambda c: -c.p_all)}
    threshold = case.engine().card.threshold
    labels = {n: f"{probability(c.p_all, threshold)}  {c.file}" for n, c in cells.items()}
    times = Counter(labels.values())  # a box takes options with one label for one
    chosen = st.selectbox(
        "Cell, by falling P(ALL)",
        list(cells),
        format_func=lambda n: labels[n] if times[labels[n]] == 1 else f"{labels[n]}  ({n + 1})",
        **state.open_in_box(cell.kept.number),
    )
    if case.waiting:
        st.caption(f"{in_number(case.waiting, 'cell')} still to be read, on the Case page.")
    return cells[chosen]


def in_number(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def summarize(patient: Patient, card: Card) -> PatientSummary | None:
    """None where no cell was read."""
    if not patient.cells:
        return None
    noted = sum(carries_weight(c.note) for c in patient.cells)
    measures = [c.measures for c in patient.cells]
    return summarize_patient([c.p_all for c in patient.cells], card, noted=noted, measures=measures)


def answer(patient: Patient, summary: PatientSummary | None) -> str:
    """A careful one, once all of the patient's cells are read."""
    if patient.waiting:
        return "reading…"
    return summary.verdict if summary else "no cell could be read"


def remarks_on(patient: Patient) -> str:
    """As "12 of 40 cells carry a note; 3 files refused."; "" where there is nothing to say."""
    n = sum(bool(c.note) for c in patient.cells)
    noted = f"{n} of {in_number(len(patient.cells), 'cell')} {'carries' if n == 1 else 'carry'} a note" if n else ""
    parts = [noted, f"{in_number(patient.refused, 'file')} refused" if patient.refused else ""]
    return f"{'; '.join(filter(None, parts))}." if any(parts) else ""


def held_out(patient: Patient, card: Card) -> str:
    """As "5 of 30 called ALL: indeterminate", of the cells that were held out of training once; "" where none was. Without the
    answer where other cells of the patient are new, or still to be read: one from these alone would not be the patient's."""
    # each was called at the operating point of its fold
    unseen = [replace(c, p_all=float(c.held_out[1])) for c in patient.cells if c.held_out]
    found = summarize(Patient(cells=unseen), card)
    verdict = f": {found.verdict}" if found and found.n == len(patient.cells) + patient.waiting else ""
    return f"{found.called} of {found.n} called ALL{verdict}" if found else ""


def trained_by(patient: Patient, card: Card) -> str:
    """As "All 48 cells took part in this network's training, …", and what came of them where they were held out; "" where none
    did, and while cells of the patient are still to be read."""
    n, of = sum(c.trained for c in patient.cells), len(patient.cells)
    if not n or patient.waiting:
        return ""
    which = f"{n} of {of:,} cells" if n < of else "The cell" if n == 1 else f"All {of:,} cells"
    labels = " (their labels alone)" if card.split.get("seen_unlabelled") else ""
    found = held_out(patient, card)
    unseen = f" Held out of it{labels}: {found}." if found else ""
    less = "nothing" if n == of else "less"
    return f"**{which} took part in this network's training**, so this says {less} of new patients.{unseen}"


def patient_card(name: str, patient: Patient, card: Card) -> None:
    """Sentence, number with interval, then the plot."""
    summary = summarize(patient, card)
    with st.container(border=True):
        words, plot = st.columns([2, 3], vertical_alignment="center")
        with words:
            told = answer(patient, summary)
            st.markdown(f"##### Patient: {plain(name)}")
            st.markdown(f"**{told[0].upper()}{told[1:]}**")
            if trained := trained_by(patient, card):
                st.markdown(trained)
            if summary:
                st.markdown(
                    f"**{summary.fraction:.0%}** of {summary.n} cells called ALL ({_interval(summary.low, summary.high)}, "
                    "95% interval)"
                )
            if remarks := remarks_on(patient):
                st.markdown(remarks)
            if summary:
                reason = "" if patient.waiting else f"{summary.reason} "
                st.caption(
                    f"{reason}Corrected for how often cells of persons outside the network's training are misread: "
                    f"{_corrected(summary)} of the cells are ALL. {PERSONS_DIFFER} {CAVEATS}"
                )
        if summary:
            plot.plotly_chart(
                figures.strip(
                    [c.p_all for c in patient.cells],
                    [
                        f"{html.escape(c.file.rpartition('/')[2])}<br>P(ALL) {probability(c.p_all, card.threshold)}"
                        for c in patient.cells
                    ],
                    card.threshold,
                ),
                key=f"strip {name}",
                config={"displayModeBar": False},
            )


def _interval(low: float, high: float) -> str:
    return f"{low:.0%} to {high:.0%}"


def _corrected(summary: PatientSummary) -> str:
    return f"{summary.corrected:.0%} ({_interval(summary.corrected_low, summary.corrected_high)})"


def patient_table(patients: dict[str, Patient], card: Card) -> None:
    """One row a patient, and what holds for every row."""
    rows = []
    for name, patient in patients.items():
        summary = summarize(patient, card)
        rows.append(
            {
                "patient": inert(name),
                "answer": answer(patient, summary),
                "cells": len(patient.cells),
                "called ALL": 100 * summary.fraction if summary else None,
                "95% interval": _interval(summary.low, summary.high) if summary else "",
                "corrected": _corrected(summary) if summary else "",
                "with a note": sum(bool(c.note) for c in patient.cells),
                "in training": sum(c.trained for c in patient.cells),
                "held out": held_out(patient, card),
                "files refused": patient.refused,
                "why": "" if patient.waiting or not summary else summary.reason,
            }
        )
    trained = any(row["in training"] for row in rows)
    st.dataframe(
        rows,
        hide_index=True,
        column_order=[name for name in rows[0] if trained or name not in ("in training", "held out")],
        column_config={
            "called ALL": st.column_config.ProgressColumn(format="%.0f%%", min_value=0, max_value=100),
            "patient": st.column_config.TextColumn(width="medium", pinned=True),
            "answer": st.column_config.TextColumn(width=180),
            "corrected": st.column_config.TextColumn(width=150),
            "why": st.column_config.TextColumn(width="large"),
        },
    )
    st.caption(
        "Corrected: the share of cells that are ALL if the patient's are misread like those of persons outside the network's "
        f"training, with its 95% interval. {PERSONS_DIFFER} {CAVEATS}" + IN_TRAINING * trained
    )


_ORDERS = {
    "P(ALL), high first": lambda cell, card: -cell.p_all,
    "P(ALL), low first": lambda cell, card: cell.p_all,
    "Nearest to the operating point": lambda cell, card: abs(cell.p_all - card.threshold),
    "As given": lambda cell, card: cell.kept.number,
}
_CHOICES = {
    "All cells": lambda cell: True,
    "Called ALL": lambda cell: cell.call == "ALL",
    "Called HEM": lambda cell: cell.call == "HEM",
    "With a note": lambda cell: bool(cell.note),
}


def arrange(cells: list[CellResult], card: Card, *, everything: list[CellResult]) -> list[CellResult]:
    """Sort and filter controls, and the CSV of `everything`; returns the cells as chosen."""
    left, middle, right = st.columns([2, 3, 1], vertical_alignment="bottom")
    order = left.selectbox("Sort", _ORDERS, **state.keep("order", list(_ORDERS)))
    choice = middle.segmented_control("Show", _CHOICES, required=True, **state.keep("choice", list(_CHOICES)))
    right.download_button("CSV", to_csv(everything, state.case().engine()), "blastoscope.csv", "text/csv", width="stretch")
    return sorted(filter(_CHOICES[choice], cells), key=lambda cell: _ORDERS[order](cell, card))


def refused_table(results: list[CellResult]) -> None:
    st.dataframe(
        [{"file": inert(r.file), "patient": inert(r.patient), "reason": inert(r.note)} for r in results],
        hide_index=True,
        column_config={"reason": st.column_config.TextColumn(width="large")},
    )


def cell_table(results: list[CellResult], card: Card) -> None:
    import pandas as pd  # here: it takes a third of a second that the first screen need not wait for

    table = pd.DataFrame(
        [(inert(r.file), inert(r.patient), r.p_all, r.call, inert(r.note), _training(r)) for r in results],
        columns=["file", "patient", "P(ALL)", "call", "note", "in training"],
    )
    if not any(r.trained for r in results):
        del table["in training"]
    if len(table) <= 2000:  # a column of texts would not sort by number; styling takes a second for 15,000 rows
        table = table.style.format({"P(ALL)": lambda p: probability(p, card.threshold, digits=3)})
        column = None
    else:
        column = {"P(ALL)": st.column_config.NumberColumn(format="%.5f")}  # so that hardly any reads as certain
    st.dataframe(table, hide_index=True, height=420, column_config=column)


def _training(result: CellResult) -> str:
    """As "yes; held out 0.714"; "" of a cell that took no part in it."""
    if not result.trained:
        return ""
    return f"yes; held out {probability(result.held_out[0], digits=3)}" if result.held_out else "yes"


def to_csv(results: list[CellResult], engine: Engine) -> bytes:
    """The table of `python -m inference`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *MADE_BY])
    writer.writerows(csv_row(result, engine) for result in results)
    return text.getvalue().encode("utf-8-sig")


def plain(text: str) -> str:
    """User text inside Markdown: every character that Markdown, HTML or LaTeX could read is escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:&" else c for c in text)


def is_demo(cell: CellResult) -> bool:
    return "synthetic" in cell.patient.lower()


def enlarge(image: np.ndarray, width: int = 600) -> np.ndarray:
    """A cell for a sharp large picture: uint8 (S, S, 3) -> (width, width, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, width), Image.Resampling.BICUBIC))


def colour_bar(colorize) -> np.ndarray:
    """A horizontal bar of a colour scale, uint8 (12, 256, 3)."""
    return colorize(np.tile(np.linspace(0, 1, 256), (12, 1)))


def layer_table(layers: list) -> None:
    """The architecture: one row a layer."""
    st.dataframe(
        [
            {
                "layer": layer.name,
                "type": layer.kind,
                "output": " × ".join(map(str, layer.shape)),
                "parameters": layer.parameters,
                "from": ", ".join(layer.inputs),
            }
            for layer in layers
        ],
        hide_index=True,
        height=420,
    )


def model_sentence(card: Card) -> str:
    """What it is, what it was measured on, the one figure, and what it cost."""
    cells = {value: [n for _, y_true, n, _ in card.subjects if y_true == value] for value in (0, 1)}
    spent, start = cost(card), card.training["start"]
    start = start if start.startswith("grown") else f"from {start}"
    if card.split["protocol"] == "image-level":
        seen = "other cells of whom trained it"
    else:
        label = "'s label" if card.split.get("seen_unlabelled") else ""
        seen = f"each measured with a network that never saw the subject{label}"
    return (
        f"{card.summary} AUROC **{with_interval(card.metrics['auroc'])}** on {sum(cells[1]):,} ALL cells of "
        f"{len(cells[1])} subjects and {sum(cells[0]):,} HEM cells of {len(cells[0])} subjects, "
        f"{seen}. "
        f"Training: {spent['work']}, {spent['time']} on {spent['device']}, {start}."
    )


METRICS = {  # as screens call them
    "auroc": "AUROC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "accuracy": "Accuracy",
    "weighted_f1": "Weighted F1",
    "f1": "F1 (ALL)",
    "subject_accuracy": "Right, mean of subjects",
    "brier": "Brier score",
    "ece": "Calibration error (ECE)",
}
COMPARED = {name: METRICS[name] for name in PAIRED}


def metric_table(card: Card) -> None:
    """Figures with their 95% intervals, as far as the card has them; the counts behind them."""
    st.dataframe(
        [
            {f"on {tested_on(card)}": label, "95% interval": with_interval(card.metrics[name])}
            for name, label in METRICS.items()
            if name in card.metrics
        ],
        hide_index=True,
    )
    n, called = ([sum(row[k] for row in card.subjects if row[1] == value) for value in (0, 1)] for k in (2, 3))
    each = len(card.split.get("test_folds", ())) > 1 and card.threshold != 0.5  # which needs no estimate: all folds have it
    st.caption(
        f"Called ALL: {called[1]:,} of {n[1]:,} ALL cells and {called[0]:,} of {n[0]:,} HEM cells, at "
        f"{'the operating point of each fold' if each else f'the operating point {card.threshold:.2f}'}. "
        "Intervals: subjects drawn with replacement, those that share pictures as one. That of ECE lies high, as drawing "
        "subjects again adds error."
    )


def _known(card: Card) -> str:
    if not (usual := card.data.get("usual")):
        return "not measured: a cell of another size or stain gets no note"
    low, high = usual["diameter_px"]["cell"]
    pale, dark = usual["darkness"]["cell"]
    return f"diameters of {low:.0f} to {high:.0f} px; mean optical density {pale:.2f} to {dark:.2f}; others get a note"


def card_details(card: Card) -> None:
    """Everything else on the card, as text."""
    point, training = card.operating_points["default"], card.training
    validated = training.get("validation_auroc")
    each = " (in turn)" if len(card.split.get("test_folds", ())) > 1 else ""
    facts = {
        "Data": card.data["source"],
        "Subjects and cells": "; ".join(
            f"{part}{each}: {n['all_cells']:,} ALL of {n['all_subjects']}, {n['hem_cells']:,} HEM of {n['hem_subjects']}"
            for part, n in card.data.items()
            if part in ("training", "validation", "test") and n["all_cells"] + n["hem_cells"]
        ),
        "Cells it knows": _known(card),
        "Framing": f"{card.framing.crop} px window at native scale, "
        + ("resized by each member" if card.members else f"resized to {card.framing.size} × {card.framing.size}"),
        "Operating point": f"{card.threshold} ({point['chosen']})" if "chosen" in point else card.threshold,
        "Temperature": card.temperature,
        "Rotations": card.rotations,
        "Members": ", ".join(card.members),
        "Training": (f"epoch {training['best_epoch']} of {training['epochs']} kept" if training["epochs"] else "no epochs")
        + (f"; AUROC on the validation cells {validated}" if validated else ""),
        "Teacher": training.get("teacher", ""),
        "Weights": f"SHA-256 {card.weights_sha256}" if card.weights_sha256 else "not bundled",
        "Licence": card.licence,
        "Versions": ", ".join(f"{k} {v}" for k, v in card.versions.items()),
    }
    st.dataframe([{"fact": k, "value": str(v)} for k, v in facts.items() if v != ""], hide_index=True)
