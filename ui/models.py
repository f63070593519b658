"""Parts of the Models page: every network in one table, the card of one, and what the split does."""

from __future__ import annotations

import numpy as np
import streamlit as st

import model_zoo
from model_zoo import BlastoscopeError
from training.metrics import reliability, roc_points
from training.results import METRICS, PAPERS, TESTED_ON, System, both_ways, cost, read_history, tested_on, with_interval
from training.sweep import list_sweeps
from ui import components, figures, resources
from ui.components import COMPARED

SPLITS = {"by subject": "Split by subject", "official test set": "Official split", "image-level": "Split by image"}
PATIENTS = {"by subject": "unseen patients", "official test set": "unseen, official set", "image-level": "known patients"}
_PLAIN = {"displayModeBar": False}


def introduce(systems: list[System]) -> None:
    """What the table holds, and how to read it."""
    measured, reading = (sum(map(bool, flags)) for flags in zip(*((s.card, s.reads_cells) for s in systems), strict=True))
    st.markdown(
        f"**{measured} networks were measured here; {reading} of them can read cells.** Look at the first column before any "
        "figure: *unseen patients* is the question of a clinic; *known patients* had other cells in training; of patients "
        "*seen without labels* it had been shown pictures, but not which disease they have. A row opens its card."
    )
    for error in model_zoo.damaged_promotions():
        st.warning(f"{components.plain(str(error))}. It is left out; restore it, or take the promotion back.", icon=None)


def choose_system(systems: list[System]) -> System:
    """One row a network; returns the chosen one, at first the one that new cases open with."""
    default = model_zoo.default_checkpoint()  # may have been promoted since the systems were read
    first = next((row for row, system in enumerate(systems) if system.name == default), 0)
    chosen = st.dataframe(
        [
            {
                "tested on": _patients(system),
                "network": system.title,
                "AUROC (95%)": _figure(system, "auroc"),
                "weighted F1 (95%)": _figure(system, "weighted_f1"),
                "its weights": "can read cells" if system.reads_cells else "figures only" if system.card else "",
                "training": _training(system),
                "its paper, and what that reports": ": ".join([_paper(system), *map(str, system.reported[:1])]),
            }
            for system in systems
        ],
        key=f"systems {len(systems)}",
        hide_index=True,
        height=388,  # ten rows
        on_select="rerun",
        selection_mode="single-row-required",
        selection_default={"selection": {"rows": [first]}},
        column_config={
            name: st.column_config.TextColumn(pinned=True, width=width)
            for name, width in (("tested on", 140), ("network", 250))
        },
    )
    return systems[chosen.selection.rows[0]]


def _patients(system: System) -> str:
    if system.card is None:
        return "not run yet"
    return "seen without labels" if system.card.split.get("seen_unlabelled") else PATIENTS[system.protocol]


def _figure(system: System, name: str) -> str:
    return with_interval(system.card.metrics.get(name)) if system.card else ""


def _paper(system: System) -> str:
    return f"{PAPERS[system.paper]} ({system.paper})" if system.paper else PAPERS[""]


def _training(system: System) -> str:
    if system.card is None:
        return ""
    return ", ".join(cost(system.card).values())


def headline(system: System) -> None:
    """The split first, then what was measured, what the paper reports, and what is missing."""
    st.markdown(f"#### {components.plain(system.title)}")
    if card := system.card:
        sentence = card.split["sentence"]
        st.markdown(f"**{SPLITS[system.protocol]}: tested on {tested_on(card)}.** {sentence[:1].upper()}{sentence[1:]}")
        st.markdown(components.model_sentence(card))
    else:
        st.markdown(f"**Not run yet.** {SPLITS[system.protocol]}: it is to be tested on {TESTED_ON[system.protocol]}.")
        st.markdown(system.summary)
    if system.reported:
        st.markdown(f"**The paper**, {_paper(system)}, reports {'; '.join(map(str, system.reported))}.")
    if not system.reads_cells:
        missing = "Figures only: its weights are not bundled." if card else "There are no figures of ours."
        st.caption(f"{missing} Train it on the Train page, or with `python -m training {system.recipe_path} --data FOLDER`.")


def measurements(system: System) -> None:
    """Figures with intervals, ROC, reliability, subjects and training, all from the files beside the card."""
    card = system.card
    left, right = st.columns(2, gap="medium")
    with left:
        components.metric_table(card)
    try:
        cells = resources.held_out(system.folder)
    except BlastoscopeError as error:
        st.warning(components.plain(str(error)), icon=None)
        return
    y_true, p_all = cells["y_true"], cells["p_all"]
    point = card.operating_points["default"]
    operating = (1 - point["specificity"][0], point["sensitivity"][0])
    with right:
        st.markdown(f"###### ROC, {len(y_true):,} cells")
        _plot(figures.roc(roc_points(y_true, p_all), card.metrics["auroc"], operating), system, "roc")
    left, right = st.columns([2, 3], gap="medium")
    with left:
        st.markdown("###### Of cells with a P(ALL) of 0.8, are 80% ALL?")
        _plot(figures.reliability(reliability(y_true, p_all, cells["group"])), system, "reliability")
    with right:
        st.markdown("###### Each subject: cells called right (blue HEM, orange ALL)")
        _plot(figures.subject_bars(card.subjects), system, "subjects")
    st.markdown("###### Training")
    history = read_history(system.folder)
    if np.isfinite([row["loss"] for row in history]).any():
        _plot(figures.curves({system.title: history}, "auroc", "AUROC").update_layout(height=300), system, "history")
    else:
        st.caption("No epochs: what the network knows was fitted in one step.")
    st.markdown(f"**Limits.** {' '.join(card.limits)}")


def _plot(figure, system: System, name: str) -> None:
    st.plotly_chart(figure, key=f"{name} {system.name}", config=_PLAIN)


def recipe(system: System) -> None:
    """The recipe as run, comments and all."""
    with st.expander("Recipe"):
        if system.recipe.exists():
            st.code(system.recipe.read_text("utf-8"), language="toml")
        elif system.card and system.card.members:
            st.caption(f"An ensemble has none of its own; see those of its members: {', '.join(system.card.members)}.")
        else:
            st.caption("No recipe lies beside this card.")


def compare_splits(systems: list[System]) -> None:
    """The same networks on unseen patients and on other cells of the same patients, and why both figures stand."""
    st.markdown("#### What the split does")
    st.markdown(
        "Divide cells by image, and cells of one person lie on both sides; a person's cells are all ALL or all HEM, so that "
        "recognising the person gives the answer away. So the **97.75%** accuracy of paper 004 (by image) and the weighted "
        "F1 of **88.9%** of paper 002 (final test set, patients never seen) both stand, and only the second tells what to "
        "expect of the next patient."
    )
    pairs = both_ways(systems)
    if not pairs:
        st.caption("No network was measured both ways yet; `python -m training RECIPE --data FOLDER --both-ways` does it.")
        return
    name = st.segmented_control(
        "Figure",
        COMPARED,
        default="accuracy",
        format_func=COMPARED.get,
        required=True,
        key="split figure",
    )
    rows = [
        (
            unseen.title if same else f"{unseen.title} *",
            unseen.card.metrics[name],
            by_image.card.metrics[name],
            [(str(f), f.value, f.protocol == "image-level") for f in unseen.reported if f.metric == name],
        )
        for unseen, by_image, same in pairs
        if name in unseen.card.metrics and name in by_image.card.metrics
    ]
    st.plotly_chart(figures.splits(rows, COMPARED[name]), key="splits", config=_PLAIN)
    differing = "" if all(same for *_, same in pairs) else "\\* By image as published, on unseen patients by our own recipe. "
    st.caption(f"{differing}Bars: 95% intervals by subject bootstrap.")


def compare_seeds() -> None:
    """Sweeps, where there are any: the same recipes with several seeds, and what of their figures is luck."""
    try:
        sweeps = list_sweeps()
    except BlastoscopeError as error:
        st.warning(components.plain(str(error)), icon=None)
        return
    if not sweeps:
        return
    st.markdown("#### Sweeps")
    st.markdown(
        "Here the same recipes were trained several times. Only the seed changed: what it draws of the split, first weights "
        "and the order of the cells. **How far the figures of one recipe lie apart is luck.** Of two recipes P(ALL) is "
        "averaged over the seeds first; they differ, with these seeds, where the interval of their difference leaves out zero."
    )
    left, right = st.columns([2, 3])
    sweep = left.selectbox("Sweep", list(sweeps), key="sweep")
    metric = right.segmented_control(
        "Figure", COMPARED, default="auroc", format_func=COMPARED.get, required=True, key="sweep figure"
    )
    rows = sweeps[sweep]
    ranges = [(row["recipe"], *(row[f"{metric}{end}"] for end in ("", "_min", "_max"))) for row in rows]
    st.plotly_chart(figures.ranges(ranges, COMPARED[metric]), key="ranges", config=_PLAIN)
    for row in rows:
        if row["against"]:
            st.markdown(_difference(row, metric))
    st.dataframe(
        [
            {
                "recipe": row["recipe"],
                "network": row["title"],
                "tested on": TESTED_ON[row["protocol"]],
                "seeds": row["seeds"],
                "trainings": row["runs"],
                **{
                    f"{label}, mean (lowest–highest)": f"{row[name]:.2f} ({row[f'{name}_min']:.2f}–{row[f'{name}_max']:.2f})"
                    for name, label in METRICS.items()
                },
            }
            for row in rows
        ],
        hide_index=True,
        column_config={
            "seeds": st.column_config.NumberColumn(format="%d"),
            "trainings": st.column_config.NumberColumn(format="%d"),
        },
    )
    st.caption(
        "Dots: mean of the seeds. Bars: from the lowest seed to the highest. They are no intervals of a patient's result."
    )


def _difference(row: dict, metric: str) -> str:
    gap, low, high = (row[f"{metric}_gap{end}"] for end in ("", "_low", "_high"))
    verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart by these subjects"
    return (
        f"**{components.plain(row['recipe'])}** against **{components.plain(row['against'])}**, on {row['shared_cells']:,.0f} "
        f"cells that both held out: {COMPARED[metric]} {gap:+.3f} (95% {low:+.3f} to {high:+.3f}): **{verdict}**."
    )
