"""Blastoscope: `streamlit run app.py`, or `make run`."""

import streamlit as st

from ui import components, state

st.set_page_config(page_title="Blastoscope", page_icon="ui/icon.svg", layout="wide")
st.logo("ui/logo.svg", size="large")
page = st.navigation(
    [
        st.Page("pages/case.py", title="Case", default=True),
        st.Page("pages/explain.py", title="Explain"),
        st.Page("pages/layers.py", title="Layers"),
        st.Page("pages/models.py", title="Models"),
        st.Page("pages/train.py", title="Train"),
    ],
    position="top",
)
state.enter(page.title)
components.header()
with components.said():
    page.run()
