"""Models: what is known about each bundled network, in the same order of facts."""

import streamlit as st

from training.metrics import roc_points
from ui import components, figures, resources

for card in resources.cards():
    with st.container(border=True):
        st.markdown(f"### {card.title}")
        st.markdown(f"**Split {card.split['protocol']}.** {card.split['sentence']}")
        st.markdown(components.model_sentence(card))
        words, roc, dots = st.columns([3, 4, 4], gap="medium")
        with words:
            components.metric_table(card)
        held_out = resources.predictions(card.name)
        with roc:
            st.markdown("###### ROC, cells of held-out subjects")
            operating = (1 - card.metrics["specificity"][0], card.metrics["sensitivity"][0])
            st.plotly_chart(
                figures.roc(roc_points(held_out["y_true"], held_out["p_all"]), card.metrics["auroc"], operating),
                key=f"roc {card.name}",
                config={"displayModeBar": False},
            )
        with dots:
            st.markdown("###### Each held-out subject (blue HEM, orange ALL)")
            st.plotly_chart(figures.subject_dots(card.subjects), key=f"dots {card.name}", config={"displayModeBar": False})
        st.markdown("**Limits.** " + " ".join(card.limits))
        with st.expander("Data, training and file"):
            components.card_details(card)
