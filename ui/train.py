"""Parts of the Train page: data, recipe, run; watching a run; comparing and promoting what it made."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from model_zoo import BlastoscopeError, Card
from training import jobs, promotion
from training.data import Cells, cache_folder, verify_cells
from training.jobs import RunState
from training.recipe import Recipe
from training.results import in_words, with_interval
from ui import components, figures, resources, state

PAPERS = {
    "": "Ours",
    "000": "Paper 000: small CNNs",
    "001": "Paper 001: AlexNet to 6-block CNN",
    "002": "Paper 002: SE-ResNeXt50",
    "003": "Paper 003: ALLNet",
    "004": "Paper 004: EfficientNetB3",
}
SPLITS = {"by_subject": "split by subject", "official": "official test set", "image_level": "split by image"}
STATES = {
    "queued": "starting",
    "running": "running",
    "stopping": "stopping",
    "stopped": "stopped",
    "finished": "finished",
    "failed": "failed",
    "crashed": "ended without a word",
}
FIGURES = components.COMPARED | {"loss": "Loss"}
_DATE = re.compile(r"^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)\S*")
_EVERY = 2.0  # seconds between two looks at a run folder


# --- 1. data ---


def choose_data() -> tuple[Path, Cells] | None:
    """The folder to train on, counted; None, with the reason on screen, while there is none."""
    folders = [str(folder) for folder in jobs.list_folders()]
    given = st.selectbox(
        "Folder of cells",
        folders,
        key="folder",
        placeholder="None is open to this app",
        help="Folders `all` and `hem`, or names that end in _all and _hem, as in C-NMC. Only folders that whoever runs "
        "this app has opened to it can be read.",
    )
    # no new option of the box above: that takes off the beginning of a path where it is what it shows already
    typed = st.text_input("Or the path of another", key="typed folder")
    with components.said():
        folder = jobs.allowed_folder(typed.strip() or given or "")
        cells = resources.cells(str(folder))
        n = cells.count()
        st.markdown(
            f"**{len(cells):,} cells of {len(set(cells.subjects))} subjects.** ALL: {n['all_cells']:,} cells of "
            f"{n['all_subjects']}. HEM: {n['hem_cells']:,} cells of {n['hem_subjects']}."
        )
        if cells.unlabelled:
            st.caption(components.plain(cells.passed_over))
        picture, names = resources.sample_sheet(str(folder))
        st.image(picture, width="stretch", alt=f"sample cells: {', '.join(names)}")
        st.caption("Above ALL, below HEM; each of another subject, at one scale.")
        _verify(str(folder))
        return folder, cells
    return None


def _verify(folder: str) -> None:
    found = state.remembered("verified", folder)
    label = "Check every picture" if found is None else "Check again"
    if st.button(label, help="Unreadable files, sizes, and pictures that occur twice. A run does it, too."):
        resources.cells.clear()  # files may have come or gone
        bar = st.progress(0.0, text="Checking")
        _, found = verify_cells(
            resources.cells(folder),
            cache=cache_folder(),
            progress=lambda done, of: bar.progress(done / of, text=f"Checking {done:,} of {of:,} pictures"),
        )
        state.remember("verified", folder, found)
        st.rerun()
    if found is None:
        return
    if not found:
        st.caption("Every picture was checked: all can be read, none occurs under two subjects.")
        return
    with st.expander(f"{len(found)} remark{'s' if len(found) > 1 else ''} on the pictures"):
        for sentence in [*found[:50], f"and {len(found) - 50:,} more"][: len(found)]:
            st.markdown(components.plain(sentence))


# --- 2. recipe ---


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A number of the recipe that can be changed, with its unit and bounds."""

    field: str
    label: str
    low: float
    high: float
    step: float
    text: str = ""
    form: str | None = None


MAIN = (
    Setting(field="epochs", label="Epochs", low=1, high=1000, step=1),
    Setting(
        field="draws_per_epoch", label="Cells per epoch", low=0, high=1_000_000, step=100, text="0: each training cell once"
    ),
    Setting(field="batch_size", label="Batch (cells)", low=1, high=1024, step=1, text="Is halved where memory is short"),
    Setting(field="learning_rate", label="Learning rate", low=1e-7, high=1.0, step=1e-5, text="Its peak", form="%.3g"),
    Setting(field="input_size", label="Input (pixels)", low=32, high=600, step=1, text="Cells are resized to it"),
    Setting(field="patience", label="Patience (epochs)", low=0, high=1000, step=1, text="Without a gain; 0: never stop"),
    Setting(field="folds", label="Folds", low=3, high=20, step=1, text="Parts of the subjects; no effect when split by image"),
    Setting(field="seed", label="Seed", low=0, high=2**31 - 1, step=1, text="Of splits, weights and draws"),
)
AUGMENT = (
    Setting(field="rotate", label="Rotation (± degrees)", low=0, high=180, step=5),
    Setting(field="shift", label="Shift (share of frame)", low=0, high=0.5, step=0.01, form="%.2f"),
    Setting(field="stain", label="Stain (± share)", low=0, high=0.9, step=0.05, text="Random colour matrix", form="%.2f"),
    Setting(field="gamma", label="Brightness (± gamma)", low=0, high=0.9, step=0.05, form="%.2f"),
    Setting(field="blur", label="Blur (pixels)", low=0, high=10, step=0.1, text="Focus; inside the cell", form="%.1f"),
)


def choose_recipe() -> tuple[str, Recipe] | None:
    """A shipped recipe with this person's changes, and its file's name; None, with the reason on screen, if they do not fit."""
    with components.said():
        recipes = jobs.shipped_recipes()
        papers = sorted({recipe.paper for recipe in recipes.values()})
        paper = st.selectbox("From", papers, format_func=lambda p: PAPERS.get(p, f"Paper {p}"), **state.keep("paper", papers))
        names = sorted((n for n, recipe in recipes.items() if recipe.paper == paper), key=lambda n: (n != "best", n))
        name = st.selectbox(
            "Recipe",
            names,
            format_func=lambda n: f"{recipes[n].title}, {SPLITS[recipes[n].protocol]}",
            **state.keep("recipe", names),
        )
        shipped = recipes[name]
        st.caption(shipped.summary)
        changes = _numbers(MAIN, shipped, name)
        if shipped.protocol == "by_subject":
            changes |= _held_out(shipped, name, int(changes["folds"]))
        with st.expander("Augmentation and start"):
            changes |= _numbers(AUGMENT, shipped, name)
            mirrors = {"": "none", "horizontal": "left and right", "both": "both axes"}
            changes["flip"] = st.selectbox(
                "Mirroring",
                mirrors,
                index=list(mirrors).index(shipped.flip),
                format_func=mirrors.get,
                **state.stay(f"{name} flip"),
            )
            if shipped.grow_from:
                st.caption("Its weights are grown from an ImageNet MobileNetV2's, on each fold's training cells.")
            else:
                starts = dict.fromkeys([shipped.weights, "", "imagenet"])
                changes["weights"] = st.selectbox(
                    "Weights at the start",
                    starts,
                    format_func=lambda w: {"": "random", "imagenet": "ImageNet, fetched by Keras"}.get(w, w),
                    **state.stay(f"{name} weights"),
                )
            if shipped.teacher and not shipped.teach_epochs:  # lessons are nothing without their teacher
                kept = st.checkbox("Learn from an ImageNet MobileNetV2, too", value=True, **state.stay(f"{name} teacher"))
                changes["teacher"] = shipped.teacher if kept else ""
        recipe = dataclasses.replace(shipped, **changes)
        _show_changes(shipped, recipe)
        return name, recipe
    return None


def _numbers(settings: tuple[Setting, ...], shipped: Recipe, name: str) -> dict:
    found = {}
    for i, setting in enumerate(settings):
        if i % 2 == 0:
            pair = st.columns(2, vertical_alignment="bottom")
        given = getattr(shipped, setting.field)
        kind = float if setting.form else int
        value = pair[i % 2].number_input(
            setting.label,
            min_value=kind(min(setting.low, given)),
            max_value=kind(max(setting.high, given)),
            value=kind(given),
            step=kind(setting.step),
            format=setting.form,
            help=setting.text or None,
            **state.stay(f"{name} {setting.field}"),
        )
        found[setting.field] = given if value == given else value  # an int stays one
    return found


def _held_out(shipped: Recipe, name: str, folds: int) -> dict:
    ways = {
        "cells": "as alike in cells as may be",
        "chance": "drawn by chance, anew with each seed",
        "stain": "from the darkest stained to the lightest",
    }
    by = st.selectbox(
        "Subjects in the folds",
        ways,
        index=list(ways).index(shipped.folds_by),
        format_func=ways.get,
        **state.stay(f"{name} folds_by"),
        help="By chance and by stain say how much a figure owes to who is tested.",
    )
    every = ["each fold in turn", *range(folds)]
    given = shipped.test_folds[0] if len(shipped.test_folds) == 1 and shipped.test_folds[0] < folds else every[0]
    held = st.selectbox(
        "Held out to measure",
        every,
        index=every.index(given),
        format_func=lambda k: f"each fold in turn: {folds} networks" if k == every[0] else f"fold {k} alone: 1 network",
        **state.stay(f"{name} held {folds}"),
    )
    if held != every[0]:
        return {"folds_by": by, "test_folds": [held], "refit": False}
    refit = st.checkbox(
        "Then one more, on all subjects, to read cells with",
        value=shipped.refit,
        **state.stay(f"{name} refit"),
        help="Without it the run measures the recipe, and leaves no network that could become the default.",
    )
    return {"folds_by": by, "test_folds": shipped.test_folds if len(shipped.test_folds) > 1 else [], "refit": refit}


def _show_changes(shipped: Recipe, recipe: Recipe) -> None:
    fields = [f.name for f in dataclasses.fields(Recipe) if getattr(shipped, f.name) != getattr(recipe, f.name)]
    if fields:
        words = (f"{field} {_value(getattr(shipped, field))} → **{_value(getattr(recipe, field))}**" for field in fields)
        st.markdown(f"Changed: {'; '.join(words)}.")
    else:
        st.caption("As shipped; nothing is changed.")


def _value(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if value not in ("", []) else "none"


# --- 3. run ---


def offer_run(data: tuple[Path, Cells] | None, chosen: tuple[str, Recipe] | None) -> None:
    """The device, the split, what it will take, and the button that starts it."""
    st.markdown(f"**{resources.device()}**")
    if data is None or chosen is None:
        st.caption("Choose data and a recipe first.")
        return
    (folder, cells), (name, recipe) = data, chosen
    with components.said():
        split = st.container()
        title = st.text_input("Name of the run", name, max_chars=60, **state.stay(f"{name} title"))
        tiny = st.checkbox(
            "Tiny: two cells a subject, 96 px, two epochs", help="Minutes on any machine. It shows that all works."
        )
        split.markdown(jobs.describe_split(recipe.tiny() if tiny else recipe, cells))
        asked = (str(folder), tiny, dataclasses.asdict(recipe))
        if st.button("Start", type="primary", width="stretch"):
            run = jobs.start_run(recipe, folder, title, tiny=tiny)
            state.watch(run.name)
            state.remember("started", asked, run.name)
            st.rerun()
        if (started := state.remembered("started", asked)) in [run.name for run in jobs.list_runs()]:
            st.markdown(f"**Started: {components.plain(started)}.** Watch it below.")
        tried = state.remembered("tried", asked)
        if tried is None and st.button("Try it: time and augmented cells", width="stretch"):
            with st.spinner("Measuring a training step; this takes about a minute"):
                tried = jobs.try_recipe(recipe, folder, tiny=tiny)
            state.remember("tried", asked, tried)
            st.rerun()
        if tried is None:
            st.caption("Trying takes a minute, and tells how long the run will take on this machine.")
            return
        st.markdown(tried["sentence"])
        st.image(tried["picture"], width="stretch", alt="each row a cell, first as it is, then as augmented for training")
        st.caption("Left a cell as it is; beside it, as augmentation shows it to the network.")


# --- watching ---


def choose_run(runs: list[RunState]) -> tuple[RunState, list[str]]:
    """The run to watch, and the names of those drawn beside it."""
    named = {run.name: run for run in runs}
    one, others = st.columns(2)
    name = one.selectbox(
        "Run",
        named,
        format_func=lambda n: f"{n}, {_state(named[n])}",
        **state.keep("watched", list(named)),
    )
    rest = [n for n in named if n != name]
    state.keep_compared(rest)
    return named[name], others.multiselect(
        "Beside it", rest, key="compared", placeholder="Choose runs to compare its curves with"
    )


def watch(run: RunState, others: list[str]) -> None:
    """All about one run; looks again every two seconds while it lives."""
    st.fragment(_watch, run_every=_EVERY if run.alive else None)(run.name, others, _state(run))


def _watch(name: str, others: list[str], before: str) -> None:
    try:
        run = jobs.read_run(name)
        compared = [jobs.read_run(other) for other in others]
    except BlastoscopeError:  # deleted, by another person
        st.rerun()
    if _state(run) != before:  # the boxes around say it, too
        st.rerun()
    words, buttons = st.columns([3, 1], vertical_alignment="center")
    with words:
        _headline(run)
    with buttons:
        _controls(run)
    histories = {r.name: [row for row in r.history() if row["loss"] == row["loss"]] for r in (run, *compared)}  # no probe's
    log = st.container()
    if run.alive or any(histories.values()):
        with log:
            _curves(run, histories)
            dots, log = st.columns([3, 2])
        with dots:
            _subjects(run)
    with log:
        st.markdown("###### Log, newest first (times in UTC)")
        lines = [_DATE.sub(r"\1", line) for line in reversed(run.log_tail(30).splitlines())]
        st.code("\n".join(lines) or "Nothing yet.", language=None, height=300, wrap_lines=True)


def _curves(run: RunState, histories: dict[str, list[dict]]) -> None:
    shown = st.segmented_control(
        "Figure", FIGURES, default="auroc", format_func=FIGURES.get, required=True, key="figure", label_visibility="collapsed"
    )
    with st.container(border=True, height=440):  # its place is kept while it is empty
        if any(histories.values()):
            st.plotly_chart(figures.curves(histories, shown, FIGURES[shown]), key="curves", config={"displayModeBar": False})
        elif run.recipe and not run.recipe.epochs + run.recipe.teach_epochs:
            st.caption("No curves: this recipe fits regressions and trains no epochs. The log tells how far it is.")
        else:
            st.caption("The curves begin after the first epoch.")


def _subjects(run: RunState) -> None:
    st.markdown("###### Validation subjects: mean P(ALL) (blue HEM, orange ALL)")
    if not _validates(run):
        st.caption("None: this recipe measures no validation cells between epochs. Curves are of its training loss.")
    elif rows := run.subjects():
        latest = [row for row in rows if row["fold"] == rows[-1]["fold"]]
        st.plotly_chart(figures.subject_paths(latest), key="subject paths", config={"displayModeBar": False})
    else:
        st.caption("One dot a subject, after each epoch.")


def _headline(run: RunState) -> None:
    st.markdown(f"##### {', '.join(_described(run))}")
    if run.alive:
        part, text = _progress(run)
        st.progress(part, text=text)
        best = _best(run) or ("No epoch was validated yet" if _validates(run) else "")
        st.caption(" · ".join(line for line in (best, resources.gpu_use()) if line))
        return
    if run.state == "finished":
        where = run.told.get("device", "this machine").split(":")[0].upper()
        sentences = f"**Finished** in {in_words(run.told.get('seconds', 0))} on {where}", _best(run)
        st.markdown(" ".join(f"{sentence}." for sentence in sentences if sentence))
        return
    word, message = _state(run).capitalize(), components.plain(run.message)
    st.markdown(f"**{message}**" if message.startswith(word) else f"**{word}.** {message}")
    if run.resumable:
        begun = "goes on from the last complete epoch, exactly as if it had not ended" if run.history() else "starts it again"
        st.caption(f"Resume {begun}.")


def _described(run: RunState) -> tuple[str, str]:
    """Network and split, in words."""
    recipe = run.recipe
    return (components.plain(recipe.title), SPLITS[recipe.protocol]) if recipe else (run.name, "its recipe cannot be read")


def _state(run: RunState) -> str:
    return "waiting" if run.waiting else STATES.get(run.state, run.state)


def _progress(run: RunState) -> tuple[float, str]:
    """Share done and words."""
    p = run.progress
    if run.waiting:
        return 0.0, "Waiting until another run leaves the device"
    if run.state == "queued":
        return 0.0, "Reading the cells"
    if "batch" not in p:
        done, of = p.get("folds_done", 0), p.get("folds_total", 1)
        return done / of, f"Preparing network {done + 1} of {of}; the first step takes longest, on a GPU up to minutes"
    steps = p["epochs"] * p["batches"]
    done, left = (p["epoch"] - 1) * p["batches"] + p["batch"], p["seconds_left"]
    left += (p["folds_total"] - p["folds_done"] - 1) * steps * p["seconds_per_batch"]
    fold = f"{p['fold'].replace('_', ' ')} ({p['folds_done'] + 1} of {p['folds_total']}), " if p["folds_total"] > 1 else ""
    text = f"{fold}epoch {p['epoch']} of {p['epochs']}, batch {p['batch']} of {p['batches']}; about {in_words(left)} left"
    text = f"finishing after epoch {p['epoch']}" if run.finishing else text
    text = "stopping after this batch" if run.state == "stopping" else text
    return min(1.0, (p["folds_done"] + done / steps) / p["folds_total"]), text.capitalize()


def _validates(run: RunState) -> bool:
    """Whether its recipe, as far as it can be read, measures validation cells after each epoch."""
    recipe = run.recipe
    if recipe is None:
        return True
    return recipe.epochs > 0 and (recipe.shares[1] > 0 if recipe.protocol == "image_level" else recipe.validation)


def _best(run: RunState) -> str:
    """The best epoch of each fold by the figure that the recipe watches; "" before the first."""
    figure = run.recipe.watch if run.recipe else "auroc"
    folds: dict[str, list] = {}
    for row in run.history():
        value = row.get(f"validation_{figure}", float("nan"))
        if value == value:  # NaN without validation cells
            folds.setdefault(row["fold"], []).append((value, row["epoch"]))
    best = [(min if figure == "loss" else max)(rows, key=lambda row: row[0]) for rows in folds.values()]
    if not best:
        return ""
    values = " / ".join(f"{value:.3f}" for value, _ in best)
    return f"Best {FIGURES[figure]} on validation cells: {values} (epoch {' / '.join(f'{epoch:.0f}' for _, epoch in best)})"


def _controls(run: RunState) -> None:
    if run.alive:
        st.button("Stop", width="stretch", disabled=run.state == "stopping", on_click=_act, args=(jobs.stop_run, run.name))
        if run.state == "running" and run.recipe and run.recipe.epochs + run.recipe.teach_epochs:
            label, then = "Finish now", ""
            if run.progress.get("folds_total", 1) > 1:
                label, then = "Finish this network", " The next one trains in full."
            st.button(
                label,
                help=f"Ends with this epoch: the best so far is kept and measured.{then}",
                width="stretch",
                disabled=run.finishing,
                on_click=_act,
                args=(jobs.finish_run, run.name),
            )
        return
    if run.resumable:
        st.button("Resume", type="primary", width="stretch", on_click=_act, args=(jobs.resume_run, run.name))
    with st.popover("Delete", width="stretch"):
        st.markdown(f"Delete run **{run.name}** with all its files? A promoted copy of its network stays.")
        st.button("Delete for good", on_click=_act, args=(jobs.delete_run, run.name))
    if remark := state.take_remark():
        st.warning(components.plain(remark), icon=None)


def _act(action, *arguments) -> None:
    """Do what a button says, or leave a remark on why it could not be done."""
    try:
        action(*arguments)
    except BlastoscopeError as error:
        state.leave_remark(str(error))


def run_table(runs: list[RunState]) -> None:
    """Every run, one row each."""
    rows = []
    for run in runs:
        values = [v for row in run.history() if (v := row.get("validation_auroc", 0.0)) == v]  # NaN without validation cells
        rows.append(
            {
                "run": run.name,
                "state": _state(run),
                **dict(zip(("network", "split"), _described(run), strict=True)),
                "epochs": len(run.history()),
                "best validation AUROC": max(values, default=None),
                "started": run.told.get("started", run.told.get("queued", ""))[:16].replace("T", " "),
                "remark": run.message,
            }
        )
    column = st.column_config.NumberColumn(format="%.3f")
    st.dataframe(rows, hide_index=True, column_config={"best validation AUROC": column})


# --- promoting ---


def offer_promotion(name: str) -> None:
    """A finished run's network beside the current default, and the button that puts it in its place."""
    last = promotion.last_promotion()
    if last and last["run"] == name:
        st.markdown(f"##### This run's network is the default\nPromoted on {last['promoted'].replace('T', ' at ')[:19]}.")
        return
    with components.said():
        card, default = jobs.read_run(name).card, resources.cards()[0]
        promotion.check_split(card)
        found = resources.comparison(name, card.weights_sha256, default.name)
        st.markdown(f"##### {components.plain(card.title)} of this run, beside the default\n{_verdict(found)}")
        _comparison_table(default, card, found)
        if not found.figures and st.button("Have the default read this run's held-out cells"):
            bar = st.progress(0.0, text=f"Loading {components.plain(default.title)}")
            promotion.read_with_default(
                name, lambda done, total: bar.progress(done / total, text=f"Reading {done:,} of {total:,} cells")
            )
            resources.comparison.clear()
            st.rerun()
        promotion.check_promotable(name)
        st.button("Make it the default", type="primary", on_click=_promote, args=(name,))
        st.caption("New cases then open with it, for everyone who uses this app. It can be taken back.")


def _verdict(found: promotion.Comparison) -> str:
    if not found.figures:
        return "The two share no held-out cells of both classes, so no difference can be given yet. Below, each on its own."
    gap, low, high = found.figures["auroc"][2]
    which = "of this run, which the default read as it is" if found.as_served else "that both were measured on"
    said = f"On the {found.cells:,} held-out cells of {found.subjects} subjects {which}, this run's AUROC is"
    said += (
        f" {abs(gap):.3f} {'higher' if gap > 0 else 'lower'} (95% interval of the difference {_signed(low)} to {_signed(high)})"
    )
    care = " Few subjects: read the interval with care." if found.subjects < 10 else ""
    return f"{said}: **{'better' if low > 0 else 'worse' if high < 0 else 'no clear difference'}**.{care}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _comparison_table(default: Card, card: Card, found: promotion.Comparison) -> None:
    rows = []
    for name, label in components.COMPARED.items():
        row = {
            "figure": label,
            "default, on its own held-out subjects": with_interval(default.metrics[name]),
            "this run, on its own": with_interval(card.metrics[name]),
        }
        if found.figures:
            old, new, (gap, low, high) = found.figures[name]
            row |= {"default, shared": f"{old:.3f}", "this run, shared": f"{new:.3f}"}
            row |= {"difference (95%)": f"{_signed(gap)} ({_signed(low)} to {_signed(high)})"}
        rows.append(row)
    st.dataframe(rows, hide_index=True)
    for title, one in (("Default", default), ("This run", card)):
        st.caption(f"{title}: {one.title}. {components.model_sentence(one)}")


def _promote(name: str) -> None:
    _act(promotion.promote, name)
    state.follow_default()


def show_default() -> None:
    """Which network new cases open with; the last promotion can be taken back."""
    last, default = promotion.last_promotion(), resources.cards()[0]
    words, button = st.columns([3, 1], vertical_alignment="center")
    if last and last["name"] != default.name:
        since = "The network that was promoted last cannot be read."
    else:
        since = f"Promoted on {last['promoted'].replace('T', ' at ')[:19]}." if last else "It is bundled with the app."
    words.caption(f"New cases open with {default.title}. {since}")
    if last:
        button.button("Take the promotion back", width="stretch", on_click=_take_back)


def _take_back() -> None:
    _act(promotion.undo_promotion)
    state.follow_default()
