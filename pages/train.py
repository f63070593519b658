"""Train: choose cells and a recipe, start a run, watch it, and put its network in the default's place."""

import streamlit as st

from training import jobs
from ui import train

runs = jobs.list_runs()
setup = st.expander("New run: data, recipe, run") if runs else st.container()
with setup:
    data_step, recipe_step, run_step = st.columns(3, gap="medium")
    with data_step.container(border=True, height="stretch"):
        st.markdown("##### 1. Data")
        data = train.choose_data()
    with recipe_step.container(border=True, height="stretch"):
        st.markdown("##### 2. Recipe")
        recipe = train.choose_recipe()
    with run_step.container(border=True, height="stretch"):
        st.markdown("##### 3. Run")
        train.offer_run(data, recipe)

if not runs:
    st.caption("A run goes on when this page is closed, and when the app is restarted. It will be listed here.")
    st.stop()

run, others = train.choose_run(runs)
train.watch(run, others)
if run.state == "finished":
    with st.container(border=True):
        train.offer_promotion(run.name)
train.show_default()
with st.expander(f"All runs ({len(runs)})"):
    train.run_table(runs)
