"""Models: every network of the papers and ours, what was measured and on which split, in the same order of facts."""

import streamlit as st

from ui import components, models, resources

systems = []
with components.said():
    systems = resources.systems()
if not systems:
    st.stop()

models.introduce(systems)
system = models.choose_system(systems)

with st.container(border=True):
    models.headline(system)
    if system.card:
        models.measurements(system)
        with st.expander("Data, training and file"):
            components.card_details(system.card)
    models.recipe(system)

models.compare_splits(systems)
models.compare_seeds()
