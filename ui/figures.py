"""Plotly figures. They take numbers, and know nothing of Streamlit."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

HEM, UNSURE, ALL = "#3B6FA8", "#9AA0A6", "#D9822B"
P_SCALE = [[0.0, HEM], [0.5, UNSURE], [1.0, ALL]]
RUNS = ("#4F86B8", "#B0699B", "#2E9C82", "#8C7A5B", "#7A7FC4", "#9AA0A6")  # told apart by the colour-blind, and not by P(ALL)
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


def strip(p_all, texts, threshold: float) -> go.Figure:
    """One dot a cell along P(ALL), with a text each, stacked where they crowd, with the operating point drawn in."""
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
            text=texts,
            hovertemplate="%{text}<extra></extra>",
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
    if len(false_positive) > 400:  # more than the eye or the browser needs
        kept = np.unique(np.linspace(0, len(false_positive) - 1, 400).astype(int))
        false_positive, true_positive = false_positive[kept], true_positive[kept]
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


def reliability(rows: list[dict[str, float]]) -> go.Figure:
    """What a P(ALL) was worth, from `training.metrics.reliability`; on the diagonal it means what it says."""
    figure = go.Figure(
        go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": _QUIET, "dash": "dot"}, hoverinfo="skip"),
    )
    figure.add_scatter(
        x=[row["p_all"] for row in rows],
        y=[row["share"] for row in rows],
        mode="lines+markers",
        line={"color": HEM, "width": 1.5},
        marker={"color": HEM, "size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["share"] for row in rows],
            "arrayminus": [row["share"] - row["low"] for row in rows],
            "thickness": 1.2,
            "width": 3,
        },
        customdata=[(row["n"], row["low"], row["high"]) for row in rows],
        hovertemplate="P(ALL) about %{x:.2f}: %{y:.0%} are ALL (%{customdata[1]:.0%}–%{customdata[2]:.0%})"
        "<br>%{customdata[0]} cells<extra></extra>",
    )
    figure.update_xaxes(title="P(ALL)", range=[-0.02, 1.02])
    figure.update_yaxes(title="share that is ALL", range=[-0.02, 1.02], tickformat=".0%")
    return _layout(figure, 340, margin={"l": 8, "r": 8, "t": 16, "b": 8})


def subject_bars(subjects: list[tuple[str, int, int, int]]) -> go.Figure:
    """Share of each subject's cells called right (paper 002, Fig. 3): (subject, y_true, n, called ALL)."""
    figure = go.Figure()
    for value, colour, label in ((0, HEM, "HEM"), (1, ALL, "ALL")):
        right = sorted((k / n if value else 1 - k / n, s, n) for s, y_true, n, k in subjects if y_true == value)
        figure.add_bar(
            x=[s for _, s, _ in right],
            y=[share for share, *_ in right],
            marker={"color": colour},
            customdata=[(n, round(share * n), label) for share, _, n in right],
            hovertemplate="subject %{x} (%{customdata[2]})<br>%{customdata[1]} of %{customdata[0]} cells called right"
            "<extra></extra>",
        )
    figure.update_xaxes(type="category", tickfont={"size": 10}, tickangle=-90 if len(subjects) > 16 else 0, showgrid=False)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", title="cells called right")
    return _layout(figure, 340, margin={"l": 8, "r": 8, "t": 16, "b": 8}).update_layout(bargap=0.25)


def splits(rows: list[tuple[str, list[float], list[float], list[tuple[str, float, bool]]]], title: str) -> go.Figure:
    """One figure of networks measured on unseen patients and on other cells of the same patients.

    Args:
        rows: (network, [estimate, low, high] on unseen patients, the same by image, what its paper reports: (words, value,
            whether that is by image)).
        title: of the figure, on screen.
    """
    figure = go.Figure()
    names = [name for name, *_ in rows]
    for name, unseen, by_image, _ in rows:
        figure.add_scatter(
            x=[unseen[0], by_image[0]],
            y=[name, name],
            mode="lines",
            line={"color": _QUIET, "width": 5},
            hoverinfo="skip",
            showlegend=False,
        )
    for column, label, symbol in ((1, "unseen patients", "circle"), (2, "other cells of the same patients", "circle-open")):
        values = [row[column] for row in rows]
        figure.add_scatter(
            x=[v[0] for v in values],
            y=names,
            mode="markers",
            name=label,
            marker={"color": HEM, "size": 11, "symbol": symbol, "line": {"width": 2, "color": HEM}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [v[2] - v[0] for v in values],
                "arrayminus": [v[0] - v[1] for v in values],
                "thickness": 1.2,
                "width": 4,
            },
            customdata=[v[1:] for v in values],
            hovertemplate=f"%{{y}}<br>{label}: %{{x:.2f}} (%{{customdata[0]:.2f}}–%{{customdata[1]:.2f}})<extra></extra>",
        )
    for seen, label, symbol in ((False, "paper, unseen patients", "cross-thin"), (True, "paper, by image", "x-thin")):
        papers = [(name, words, value) for name, _, _, told in rows for words, value, by_image in told if by_image is seen]
        figure.add_scatter(
            x=[value for *_, value in papers],
            y=[name for name, *_ in papers],
            mode="markers",
            name=label,
            marker={"color": UNSURE, "size": 10, "symbol": symbol, "line": {"width": 2.5, "color": UNSURE}},
            text=[words for _, words, _ in papers],
            hovertemplate="%{y}<br>%{text}<extra></extra>",
            showlegend=bool(papers),
        )
    figure.update_xaxes(title=title, tickformat=".2f")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    _layout(figure, 130 + 38 * len(rows))
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0})


def ranges(rows: list[tuple[str, float, float, float]], title: str) -> go.Figure:
    """A figure over the seeds of each recipe, the first on top: (recipe, mean, lowest, highest); `title` of it, on screen."""
    names = [name for name, *_ in rows]
    figure = go.Figure()
    for name, _, low, high in rows:
        bar = {"color": _QUIET, "width": 8}
        figure.add_scatter(x=[low, high], y=[name, name], mode="lines", line=bar, hoverinfo="skip")
    figure.add_scatter(
        x=[mean for _, mean, *_ in rows],
        y=names,
        mode="markers",
        marker={"color": HEM, "size": 11},
        customdata=[(low, high) for *_, low, high in rows],
        hovertemplate="%{y}<br>mean %{x:.3f}, from %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>",
    )
    figure.update_xaxes(title=title, tickformat=".2f")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    return _layout(figure, 90 + 38 * len(rows))


def depth_shares(rows: list[tuple[str, float, float]], chosen: str) -> go.Figure:
    """Share of zero activations through the depth: (layer, exactly zero, at or below zero)."""
    names = [name for name, *_ in rows]
    x = list(range(1, len(rows) + 1))
    figure = go.Figure(
        [
            go.Scatter(
                x=x,
                y=[below for *_, below in rows],
                mode="lines",
                line={"color": UNSURE, "width": 1},
                name="at or below zero",
                text=names,
                hovertemplate="%{text}<br>%{y:.0%} at or below zero<extra></extra>",
            ),
            go.Scatter(
                x=x,
                y=[zero for _, zero, _ in rows],
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


def curves(histories: dict[str, list[dict]], metric: str, title: str) -> go.Figure:
    """Loss and a validation figure by epoch, of each run and fold; the first run stands out.

    Args:
        histories: run -> rows of history.csv.
        metric: auroc, accuracy, weighted_f1 or loss.
        title: of the metric, on screen.
    """
    shown = [(1, "loss")]
    if any(row[f"validation_{metric}"] == row[f"validation_{metric}"] for rows in histories.values() for row in rows):
        shown.append((2, f"validation_{metric}"))  # not NaN: there are validation cells
    titles = ("Training loss", f"{title} on validation cells")[: len(shown)]
    figure = make_subplots(1, len(shown), horizontal_spacing=0.08, subplot_titles=titles)
    for number, (run, rows) in enumerate(histories.items()):
        colour, first = RUNS[number % len(RUNS)], number == 0
        folds = list(dict.fromkeys(row["fold"] for row in rows))
        for fold in folds:
            mine = [row for row in rows if row["fold"] == fold]
            for column, key in shown:
                figure.add_scatter(
                    x=[row["epoch"] for row in mine],
                    y=[row[key] for row in mine],
                    mode="lines+markers",
                    name=run,
                    legendgroup=run,
                    showlegend=column == 1 and fold == folds[0],
                    line={"color": colour, "width": 2.5 if first and fold == folds[-1] else 1.2},
                    marker={"size": 7 if first and fold == folds[-1] else 4},
                    opacity=1 if first or len(folds) == 1 else 0.6,
                    hovertemplate=f"{run}, {fold.replace('_', ' ')}, epoch %{{x}}<br>%{{y:.3f}}<extra></extra>",
                    row=1,
                    col=column,
                )
    _layout(figure, 400, margin={"l": 8, "r": 8, "t": 32, "b": 8})
    _epoch_axis(figure, max((row["epoch"] for rows in histories.values() for row in rows), default=1))
    figure.update_annotations(font={"size": 13})
    return figure.update_layout(showlegend=len(histories) > 1, legend={"orientation": "h", "y": -0.2, "x": 0})


def subject_paths(rows: list[dict]) -> go.Figure:
    """Mean P(ALL) of each validation subject after every epoch, from rows of subjects.csv of one fold."""
    figure = go.Figure()
    for subject in sorted({row["subject"] for row in rows}):
        mine = [row for row in rows if row["subject"] == subject]
        label, colour = ("ALL", ALL) if mine[0]["y_true"] else ("HEM", HEM)
        figure.add_scatter(
            x=[row["epoch"] for row in mine],
            y=[row["mean_p_all"] for row in mine],
            mode="lines+markers",
            line={"color": colour, "width": 1},
            marker={"color": colour, "size": 7},
            opacity=0.75,
            hovertemplate=f"subject {subject} ({label}), {mine[0]['n']:.0f} cells<br>epoch %{{x}}: %{{y:.2f}}<extra></extra>",
        )
    _epoch_axis(figure, max(row["epoch"] for row in rows))
    figure.update_yaxes(title="mean P(ALL)", range=[-0.03, 1.03])
    return _layout(figure, 300)


def _epoch_axis(figure: go.Figure, last: float) -> None:
    figure.update_xaxes(title="epoch", tickformat="d", dtick=1 if last <= 10 else None)
