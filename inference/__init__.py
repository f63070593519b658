"""Bytes and arrays in, arrays and frozen dataclasses out. Nothing here imports Streamlit."""
