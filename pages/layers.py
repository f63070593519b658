"""Layers: walk through the network and look at what each layer makes of the cell."""

import streamlit as st

from inference.images import frame_cell
from inference.layers import tile_maps
from ui import components, figures, resources, state

MAPS = 64

choose, network = st.columns([3, 2], gap="large")
with network:
    read_by = components.choose_checkpoint()
    card = components.choose_member(read_by)
with choose:
    cell = components.pick_cell()
fed = frame_cell(cell.kept.window(), card.framing)[None]
with st.spinner("Opening the network"):
    taps = resources.layer_taps(card.name)

names = [layer.name for layer in taps.maps]
back, pick, forward = st.columns([1, 4, 1], vertical_alignment="bottom")
back.button("Previous layer", on_click=state.step_layer, args=(names, -1), width="stretch")
name = pick.selectbox(
    f"Layer ({len(names)} convolutions, activations and poolings, in order)",
    names,
    format_func=lambda n: f"{names.index(n) + 1}. {n} · {taps.find(n).role}",
    **state.keep("layer", names),
)
forward.button("Next layer", on_click=state.step_layer, args=(names, 1), type="primary", width="stretch")

layer = taps.find(name)
maps = taps.feature_maps(fed, name)[0]
height, width, channels = maps.shape
shares = taps.zero_shares(fed)
exactly, below = next((zero, low) for tapped, zero, low in shares if tapped.name == name)

sheet, facts = st.columns([5, 3], gap="large")
with sheet:
    first = 0
    if channels > MAPS:
        last = (channels - 1) // MAPS
        page = st.slider(f"Maps, {MAPS} at a time", 1, last + 1, 1, key=f"maps {name}")
        first = (page - 1) * MAPS
    shown = maps[:, :, first : first + MAPS]
    columns = min(8, max(3, shown.shape[2]))
    st.image(
        tile_maps(shown, columns=columns, scale=max(1, 880 // (columns * height)), gap=2),
        caption=f"Maps {first + 1}–{first + shown.shape[2]} of {channels}. Grey is a map's own mean, lighter is more, "
        "darker less; a map that is black all over has no contrast for this cell.",
        width="stretch",
        alt=f"what layer {name} makes of the cell, one small picture a map",
    )
    with st.expander("Enlarge one map"):
        number = st.number_input("Map", 1, channels, first + 1, key=f"map {name}")
        one = maps[:, :, number - 1 : number]
        st.image(
            tile_maps(one, columns=1, scale=max(1, 800 // height), gap=0),
            caption=f"Map {number} of {components.plain(name)}",
            width="stretch",
            alt=f"map {number} of layer {name}, enlarged",
        )
with facts:
    st.image(
        components.enlarge(fed[0]),
        caption=f"{components.plain(cell.file)} · P(ALL) {components.probability(cell.p_all, read_by.threshold)}"
        + (" by the ensemble" if read_by.members else ""),
        width=220,
        alt="the cell as the network gets it",
    )
    st.markdown(
        f"**{layer.name}** ({layer.kind}, {layer.role}) makes {channels} maps of {height} × {width} with "
        f"{layer.parameters:,} parameters. For this cell {exactly:.0%} of its activations are exactly zero and "
        f"{below:.0%} are at or below zero."
    )

st.markdown("##### How much stays silent, from the first layer to the last")
st.plotly_chart(
    figures.depth_shares([(tapped.name, zero, low) for tapped, zero, low in shares], name),
    config={"displayModeBar": False},
)
st.caption(
    "In networks with ReLU most activations are zero towards the end (paper 001): few, specific features fire. "
    "SiLU, which EfficientNet uses, is hardly ever exactly zero; there, read the grey line."
)
with st.expander(f"The architecture as a table: {len(taps.layers)} layers"):
    components.layer_table(taps.layers)
