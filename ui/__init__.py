"""What pages are made of; with app.py and pages/ the only code that imports Streamlit."""
