"""Bytes and arrays in, arrays and frozen dataclasses out. Nothing here imports Streamlit."""

import os

# onnxruntime reports usage to its maker unless this is set before it is imported. Nothing leaves this machine.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
