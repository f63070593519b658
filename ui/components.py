"""Parts of screens that several pages share."""

from __future__ import annotations

import csv
import io

import numpy as np
import streamlit as st
from PIL import Image

from inference.__main__ import COLUMNS, csv_row
from inference.cells import CellResult
from inference.engine import Engine
from inference.patients import PatientSummary, summarize_patient
from model_zoo import Card
from training.results import TESTED_ON, cost
from ui import figures, resources, state

INTENDED_USE = "Research and education — not a medical device."


def header() -> None:
    """The quiet line that stands on every screen."""
    st.caption(f"{INTENDED_USE} Reads single, segmented white blood cells: ALL blasts against healthy B-lymphoid precursors.")


def choose_checkpoint(label: str = "Network") -> Card:
    """Select box of bundled checkpoints; a change has the case scored again."""
    case, cards = state.case(), resources.cards()
    names = [card.name for card in cards]
    name = st.selectbox(
        label,
        names,
        index=names.index(case.checkpoint),
        format_func=lambda n: (
            f"{resources.card(n).title} · AUROC {resources.card(n).metrics['auroc'][0]:.2f} on unseen subjects"
        ),
    )
    if name != case.checkpoint:
        case.switch(name, first=state.selected())
    return resources.card(name)


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
    case = state.case()
    before = (case.rotations or card.rotations) == 8
    averaged = st.checkbox(
        "Average over 8 rotations: slower, steadier",
        value=before,
        help="The network reads every cell eight times, turned by 45° each time, and the mean of its logits counts "
        "(paper 002). Takes eight times as long.",
    )
    if averaged != before:
        case.switch(case.checkpoint, first=state.selected(), rotations=8 if averaged else 1)
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
            "What you get": "P(ALL) of every cell, sorted in a gallery. For each patient the share of cells called ALL, "
            "with its interval and a careful answer. A CSV of it all. Click a cell to see where the network looked.",
            "What stays here": "Images are read on this machine and go nowhere else. They are deleted when the case is closed. "
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
        case.advance()
    cell = state.selected()
    if cell is None:
        no_cell_yet()
    cells = sorted(case.scored, key=lambda c: -c.p_all)
    numbers = [c.kept.number for c in cells]
    named = {c.kept.number: c for c in cells}
    chosen = st.selectbox(
        "Cell, by falling P(ALL)",
        numbers,
        index=numbers.index(cell.kept.number),
        format_func=lambda n: f"{named[n].p_all:.2f}  {named[n].file}",
    )
    if chosen != cell.kept.number:
        state.select(chosen)
    return named[chosen]


def patient_sentence(summary: PatientSummary) -> str:
    return f"**{summary.fraction:.0%}** of {summary.n} cells called ALL ({summary.low:.0%} to {summary.high:.0%}, 95% interval)"


def patient_card(patient: str, cells: list[CellResult], card: Card) -> None:
    """Sentence, number with interval, then the plot."""
    summary = summarize_patient([c.p_all for c in cells], card)
    with st.container(border=True):
        words, plot = st.columns([2, 3], vertical_alignment="center")
        with words:
            st.markdown(f"##### Patient: {plain(patient)}")
            st.markdown(f"**{summary.verdict[0].upper()}{summary.verdict[1:]}**")
            st.markdown(patient_sentence(summary))
            st.caption(
                f"{summary.reason} Corrected for the network's errors on unseen subjects: {summary.corrected:.0%} "
                f"({summary.corrected_low:.0%} to {summary.corrected_high:.0%}). Of the cells supplied; "
                "not a marrow differential. Flow cytometry decides."
            )
        plot.plotly_chart(
            figures.strip([c.p_all for c in cells], [c.file.rpartition("/")[2] for c in cells], card.threshold),
            key=f"strip {patient}",
            config={"displayModeBar": False},
        )


def patient_table(patients: dict[str, list[CellResult]], card: Card) -> None:
    """One row a patient."""
    rows = []
    for patient, cells in patients.items():
        summary = summarize_patient([c.p_all for c in cells], card)
        rows.append(
            {
                "patient": patient,
                "cells": summary.n,
                "called ALL": 100 * summary.fraction,
                "95% interval": f"{summary.low:.0%} to {summary.high:.0%}",
                "answer": summary.verdict,
            }
        )
    st.dataframe(
        rows,
        hide_index=True,
        column_config={"called ALL": st.column_config.ProgressColumn(format="%.0f%%", min_value=0, max_value=100)},
    )


_ORDERS = {
    "P(ALL), high first": lambda cell, card: -cell.p_all,
    "P(ALL), low first": lambda cell, card: cell.p_all,
    "Nearest to the operating point": lambda cell, card: abs(cell.p_all - card.threshold),
    "As given": lambda cell, card: 0,
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
    order = left.selectbox("Sort", _ORDERS, key="order")
    choice = middle.segmented_control("Show", _CHOICES, default="All cells", required=True, key="choice")
    right.download_button("CSV", to_csv(everything, state.case().engine()), "blastoscope.csv", "text/csv", width="stretch")
    return sorted(filter(_CHOICES[choice], cells), key=lambda cell: _ORDERS[order](cell, card))


def cell_table(results: list[CellResult]) -> None:
    st.dataframe(
        [{"file": r.file, "patient": r.patient, "P(ALL)": r.p_all, "call": r.call, "note": r.note} for r in results],
        hide_index=True,
        height=420,
        column_config={"P(ALL)": st.column_config.NumberColumn(format="%.3f")},
    )


def to_csv(results: list[CellResult], engine: Engine) -> bytes:
    """The columns of `python -m inference`, and what made the numbers."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, "checkpoint", "weights_sha256", "operating_point", "rotations"])
    made = (engine.card.name, engine.card.weights_sha256[:16], engine.card.threshold, engine.rotations)
    for result in results:
        writer.writerow([*csv_row(result, engine.remark), *made])
    return text.getvalue().encode("utf-8-sig")


def figure_with_interval(values: list[float]) -> str:
    """[estimate, low, high] as `.87 (.79–.93)`."""
    return f"{values[0]:.2f} ({values[1]:.2f}–{values[2]:.2f})"


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
    seen = card.split["protocol"] == "image-level"
    spent = cost(card)
    return (
        f"{card.summary} AUROC **{figure_with_interval(card.metrics['auroc'])}** on {sum(cells[1]):,} ALL cells of "
        f"{len(cells[1])} subjects and {sum(cells[0]):,} HEM cells of {len(cells[0])} subjects, "
        f"{'other cells of whom trained it' if seen else 'each measured with a network that never saw the subject'}. "
        f"Training: {spent['work']}, {spent['time']} on {spent['device']}, from {card.training['start']}."
    )


_METRICS = {
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


def metric_table(card: Card) -> None:
    """Figures with their 95% intervals, as far as the card has them; the counts behind them."""
    st.dataframe(
        [
            {f"on {TESTED_ON[card.split['protocol']]}": label, "95% interval": figure_with_interval(card.metrics[name])}
            for name, label in _METRICS.items()
            if name in card.metrics
        ],
        hide_index=True,
    )
    n, called = ([sum(row[k] for row in card.subjects if row[1] == value) for value in (0, 1)] for k in (2, 3))
    each = len(card.split.get("test_folds", ())) > 1 and card.threshold != 0.5  # which needs no estimate: all folds have it
    st.caption(
        f"Called ALL: {called[1]:,} of {n[1]:,} ALL cells and {called[0]:,} of {n[0]:,} HEM cells, at "
        f"{'the operating point of each fold' if each else f'the operating point {card.threshold:.2f}'}. "
        "Intervals: subjects drawn with replacement."
    )


def card_details(card: Card) -> None:
    """Everything else on the card, as text."""
    point, training = card.operating_points["default"], card.training
    validated = training.get("validation_auroc")
    facts = {
        "Data": card.data["source"],
        "Subjects and cells": "; ".join(
            f"{part}: {n['all_cells']} ALL of {n['all_subjects']}, {n['hem_cells']} HEM of {n['hem_subjects']}"
            for part, n in card.data.items()
            if isinstance(n, dict) and n["all_cells"] + n["hem_cells"]
        ),
        "Framing": f"{card.framing.crop} px window at native scale, "
        + ("resized by each member" if card.members else f"resized to {card.framing.size} × {card.framing.size}"),
        "Operating point": f"{card.threshold} ({point['chosen']})" if "chosen" in point else card.threshold,
        "Temperature": card.temperature,
        "Rotations": card.rotations,
        "Members": ", ".join(card.members),
        "Training": f"epoch {training['best_epoch']} of {training['epochs']} kept"
        + (f"; AUROC on the validation cells {validated}" if validated else ""),
        "Teacher": training.get("teacher", ""),
        "Weights": f"SHA-256 {card.weights_sha256}" if card.weights_sha256 else "not bundled",
        "Licence": card.licence,
        "Versions": ", ".join(f"{k} {v}" for k, v in card.versions.items()),
    }
    st.dataframe([{"fact": k, "value": str(v)} for k, v in facts.items() if v != ""], hide_index=True)
