"""What pages are made of; with app.py and pages/ the only code that imports Streamlit."""

import streamlit as st
from streamlit.runtime.pages_manager import PagesManager

# Until st.navigation was called once, Streamlit takes pages/ for a navigation of its own: a server whose first request
# is a page's address would show that page bare, without the intended-use line. Run app.py instead, which calls it.
if PagesManager.uses_pages_directory:
    PagesManager.uses_pages_directory = False
    st.rerun()
