"""Case (home): drop a patient's cells, get P(ALL) per cell and a careful answer per patient."""

import streamlit as st

from ui import components, resources, state
from ui.gallery import gallery

TILES = 300  # in the gallery
CARDS = 3  # of patients, before a table stands in for them

case = state.case()
empty = not case.total

upload, settings = st.columns([3, 2], gap="large")
with settings:
    card = components.choose_checkpoint()
    components.choose_rotations(card)
    demo, fresh = st.columns([2, 1])
    if demo.button(
        "Try the demo patients",
        key="demo",
        type="primary" if empty else "secondary",
        width="stretch",
        disabled=case.synthetic,
    ):
        case.add_demo()
        st.rerun()
    if fresh.button("New case", width="stretch", disabled=empty):
        state.new_case()
        st.rerun()
with upload:
    ways = {"Cells or a ZIP": True, "A folder": "directory"}
    way = st.segmented_control("Add", ways, required=True, label_visibility="collapsed", **state.ways_box(list(ways)))
    uploads = st.file_uploader(
        "Drop a folder; its subfolders become patients" if way == "A folder" else "Drop cells, or a ZIP of a patient's cells",
        accept_multiple_files=ways[way],
        **state.uploader_box(),
    )
    case.add_uploads(uploads)

# Containers hold their places: what comes and goes inside them does not move or redraw the gallery below.
progress, remarks, people = st.container(), st.container(), st.container()
reading = case.waiting > 0
if reading:
    done = case.total - case.waiting
    patient = f" · patient: {components.plain(case.next_patient)}" if case.next_patient else ""
    progress.progress(done / case.total, text=f"Reading {done:,} of {case.total:,} cells{patient}")
    case.advance()
elif empty:
    components.how_it_reads()
    case.engine()  # loads while the user looks for the first cell
    st.stop()

with remarks:
    if case.synthetic:
        st.caption("The demo patients are **synthetic**: generated cells, no person's.")
    if case.joined:
        names = ", ".join(map(components.plain, sorted(case.joined)))
        st.caption(f"Cells were added to a patient who was here before: {names}. Of another person? Start a new case for them.")
    if case.refused:
        with st.expander(f"{len(case.refused)} of {case.total} files were refused; the reasons"):
            components.refused_table(case.refused)

patients = case.by_patient()
read = {name: patient for name, patient in patients.items() if patient.cells or patient.waiting} or patients
with people:
    if len(read) > CARDS:
        components.patient_table(patients, card)
    elif unread := [components.plain(name) for name in patients if name not in read]:
        more = f" and {len(unread) - 5:,} more" if len(unread) > 5 else ""
        st.caption(f"No cell could be read of: {', '.join(unread[:5])}{more}.")
    shown = ""  # no patient's name
    if len(patients) > 1:
        options = [shown, *patients]
        everyone = "All patients" if "All patients" not in patients else "All of them"
        shown = st.selectbox("Patient", options, format_func=lambda name: name or everyone, **state.keep("patient", options))
    for patient in [shown] if shown in patients else read if len(read) <= CARDS else []:
        components.patient_card(patient, patients[patient], card)

cells = patients[shown].cells if shown in patients else case.scored
cells = components.arrange(cells, card, everything=[*case.scored, *case.refused])
pictures, table = st.tabs(["Gallery", "Table"])
with pictures:
    opened = gallery(cells[:TILES], card.threshold, key="gallery")
    rest = f"; the first {TILES} are shown here, the table and the CSV hold all" if len(cells) > TILES else ""
    st.caption(f"{components.in_number(len(cells), 'cell')}{rest}. Click a cell to see where the network looked.")
with table:
    components.cell_table(cells, card)

if opened is not None:
    state.select(opened)
    st.switch_page("pages/explain.py")
if reading:  # once more when all is read, so that the progress line goes
    st.rerun()
if not case.warmed:
    case.warmed = True
    resources.warm_explainer(case.checkpoint)
