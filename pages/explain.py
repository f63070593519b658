"""Explain: one cell, where the network looked, and what it was fed."""

import streamlit as st

from inference.explain import colorize, describe_cam, describe_size, overlay_cam
from inference.gate import cell_mask
from inference.images import crop_cell, frame_cell, resize_cells
from training.results import tested_on, with_interval
from ui import components, resources, state

case = state.case()
choose, network = st.columns([3, 2], gap="large")
with network:
    card = components.choose_checkpoint()
with choose:
    cell = components.pick_cell()

window = cell.kept.window()
seen, fed = crop_cell(window, card.framing.crop), frame_cell(window, card.framing)
members = [resources.card(name) for name in card.members] or [card]

picture, words = st.columns([2, 3], gap="large")
place, what = picture.empty(), f"{components.plain(cell.file)} · {card.framing.crop} px window at native scale"
if case.explained != card.name:  # a network's first explanation takes seconds
    place.image(components.enlarge(seen), caption=what, width="stretch", alt="the cell")
with words:
    st.markdown(f"### P(ALL) {components.probability(cell.p_all, card.threshold)}")
    st.markdown(
        f"Called **{cell.call}** at the operating point {card.threshold:.2f}. There, on "
        f"{tested_on(card, 'subjects')}: "
        f"sensitivity {with_interval(card.metrics['sensitivity'])}, "
        f"specificity {with_interval(card.metrics['specificity'])}."
    )
    components.rotations_remark()
    if cell.remark:
        st.markdown(f"**Not new to it:** {cell.remark}.")
    if cell.note:
        end = "" if cell.note.endswith("?") else "."
        st.markdown(f"Note: {components.plain(cell.note)}{end}")
    label = (
        st.segmented_control(
            "Show what speaks for", ["ALL", "HEM"], default=cell.call, key=f"label {cell.kept.number} {card.name} {cell.call}"
        )
        or cell.call
    )
    opacity = st.slider("Opacity of the map", 0, 100, 45, format="%d %%", key="opacity") / 100
    with st.spinner("Preparing the explanation; the first one in this session takes about ten seconds"):
        explainer = resources.explainer(card.name)
        cam = explainer.cam(fed[None], label)[0]
        share = float(explainer.size_share(fed[None])[0])
    st.markdown(" ".join([describe_cam(cam, cell_mask(seen), label), describe_size(share, cell.p_all)]))
    st.image(components.colour_bar(colorize), width=260, alt="colour scale, black over red to yellow")
    st.caption(f"left: nothing that speaks for {label} · right: the most within this cell")
    st.caption(
        f"Grad-CAM (Selvaraju et al. 2017) at {components.layers_in_words(explainer.layers)}: "
        f"{cam.shape[0]} × {cam.shape[1]} values, enlarged "
        f"smoothly to {card.framing.crop} × {card.framing.crop} px. It shows where evidence came from, not what it means."
    )
    original, network_input, _ = st.columns(3)
    original.image(components.enlarge(seen), caption="The cell", width="stretch", alt="the cell at native scale")
    size = min(member.framing.size for member in members)
    network_input.image(
        components.enlarge(resize_cells(fed[None], size)[0]),
        caption=f"Fed to {components.sizes_in_words(members)}, 8-bit RGB",
        width="stretch",
        alt="the cell as the network gets it",
    )
place.image(
    overlay_cam(components.enlarge(seen), cam, opacity),
    caption=f"{what}, with what speaks for {label}",
    width="stretch",
    alt=f"the cell under a heat map of what speaks for {label}",
)
case.explained = card.name
if case.synthetic and components.is_demo(cell):
    st.caption("This cell is **synthetic**: generated, no person's.")
