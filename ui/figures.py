"""Plotly figures. They take numbers, and know nothing of Streamlit."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

HEM, UNSURE, ALL = "#3B6FA8", "#9AA0A6", "#D9822B"
P_SCALE = [[0.0, HEM], [0.5, UNSURE], [1.0, ALL]]
_QUIET = "rgba(128,132,140,.35)"


def _layout(figure: go.Figure, height: int, **extra) -> go.Figure:
    margins = extra.pop("margin", {"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_layout(
        height=height,
        margin=margins,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        dragmode=False,
        **extra,
    )
    figure.update_xaxes(gridcolor=_QUIET, zeroline=False, fixedrange=True)
    figure.update_yaxes(gridcolor=_QUIET, zeroline=False, fixedrange=True)
    return figure


def strip(p_all, files, threshold: float) -> go.Figure:
    """One dot a cell along P(ALL), stacked where they crowd, with the operating point drawn in."""
    p_all = np.asarray(p_all)
    bins = np.minimum((p_all * 60).astype(int), 59)
    order = np.argsort(p_all, kind="stable")
    level = np.zeros(len(p_all), int)
    seen = np.zeros(60, int)
    for i in order:
        level[i] = seen[bins[i]]
        seen[bins[i]] += 1
    size = 7 if seen.max() <= 14 else 5 if seen.max() <= 40 else 3
    figure = go.Figure(
        go.Scatter(
            x=p_all,
            y=level,
            mode="markers",
            text=files,
            hovertemplate="%{text}<br>P(ALL) %{x:.2f}<extra></extra>",
            marker={"color": p_all, "colorscale": P_SCALE, "cmin": 0, "cmax": 1, "size": size},
        )
    )
    figure.add_vline(x=threshold, line={"color": "gray", "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=threshold,
        y=1,
        yref="paper",
        text=f"operating point {threshold:.2f}",
        showarrow=False,
        yanchor="bottom",
        font={"size": 11},
    )
    figure.update_xaxes(
        range=[-0.02, 1.02], tickvals=[0, 0.25, 0.5, 0.75, 1], title={"text": "P(ALL) of each cell", "font": {"size": 12}}
    )
    figure.update_yaxes(visible=False, range=[-1, max(10, seen.max() + 1)])
    return _layout(figure, 150, margin={"l": 8, "r": 8, "t": 22, "b": 40})


def roc(points, auroc: list[float], operating: tuple[float, float]) -> go.Figure:
    """ROC curve from (false positive rate, true positive rate) arrays; `operating` is (1 - specificity, sensitivity)."""
    false_positive, true_positive = points
    figure = go.Figure(
        [
            go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": _QUIET, "dash": "dot"}, hoverinfo="skip"),
            go.Scatter(
                x=false_positive,
                y=true_positive,
                mode="lines",
                line={"color": HEM, "width": 2.5},
                hovertemplate="1 − specificity %{x:.2f}<br>sensitivity %{y:.2f}<extra></extra>",
            ),
            go.Scatter(
                x=[operating[0]],
                y=[operating[1]],
                mode="markers+text",
                text=["operating point"],
                textposition="bottom right",
                marker={"color": ALL, "size": 10},
                hovertemplate="operating point<extra></extra>",
            ),
        ]
    )
    figure.add_annotation(
        x=0.98, y=0.04, text=f"AUROC {auroc[0]:.2f} ({auroc[1]:.2f}–{auroc[2]:.2f})", showarrow=False, xanchor="right"
    )
    figure.update_xaxes(title="1 − specificity", range=[-0.01, 1.01], constrain="domain")
    figure.update_yaxes(title="sensitivity", range=[-0.01, 1.01], scaleanchor="x", constrain="domain")
    return _layout(figure, 340, margin={"l": 8, "r": 8, "t": 16, "b": 8})


def subject_dots(subjects: list[tuple[str, int, int, int]]) -> go.Figure:
    """Share of cells called ALL for every held-out subject: (subject, y_true, n, called)."""
    ordered = sorted(subjects, key=lambda s: (s[1], s[3] / s[2]))
    figure = go.Figure()
    for value, colour, label in ((0, HEM, "HEM"), (1, ALL, "ALL")):
        rows = [s for s in ordered if s[1] == value]
        figure.add_scatter(
            x=[k / n for _, _, n, k in rows],
            y=[s for s, *_ in rows],
            mode="markers",
            marker={"color": colour, "size": [6 + min(10, n / 15) for _, _, n, _ in rows]},
            customdata=[(n, k, label) for _, _, n, k in rows],
            hovertemplate="subject %{y} (%{customdata[2]})<br>%{customdata[1]} of %{customdata[0]} called ALL<extra></extra>",
        )
    figure.update_xaxes(title="share of the subject's cells called ALL", range=[-0.03, 1.03], tickformat=".0%")
    figure.update_yaxes(type="category", tickfont={"size": 11}, title="held-out subject")
    return _layout(figure, 340, margin={"l": 8, "r": 8, "t": 16, "b": 8})


def depth_shares(rows: list[tuple[str, str, float, float]], chosen: str) -> go.Figure:
    """Share of zero activations through the depth: (layer, role, exactly zero, at or below zero)."""
    names = [name for name, *_ in rows]
    x = list(range(1, len(rows) + 1))
    figure = go.Figure(
        [
            go.Scatter(
                x=x,
                y=[r[3] for r in rows],
                mode="lines",
                line={"color": UNSURE, "width": 1},
                name="at or below zero",
                text=names,
                hovertemplate="%{text}<br>%{y:.0%} at or below zero<extra></extra>",
            ),
            go.Scatter(
                x=x,
                y=[r[2] for r in rows],
                mode="lines+markers",
                line={"color": HEM, "width": 1.5},
                marker={"size": 4},
                name="exactly zero",
                text=names,
                hovertemplate="%{text}<br>%{y:.0%} exactly zero<extra></extra>",
            ),
        ]
    )
    if chosen in names:
        figure.add_vline(x=names.index(chosen) + 1, line={"color": ALL, "width": 2})
    figure.update_xaxes(title="depth: layer 1 … " + str(len(rows)))
    figure.update_yaxes(title="share of activations", tickformat=".0%", range=[-0.02, 1.02])
    _layout(figure, 300)
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12, "x": 0})
