import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from training.metrics import (
    _ends,
    auroc,
    bootstrap_metrics,
    cell_metrics,
    fit_temperature,
    paired_difference,
    reliability,
    youden_threshold,
)

few = settings(max_examples=60, deadline=None)


@st.composite
def scored(draw):
    """y_true with both classes, and scores with many ties."""
    n = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    y_true = np.r_[0, 1, rng.integers(0, 2, n)]
    return y_true, rng.integers(0, draw(st.sampled_from([3, 1000])) + 1, n + 2) / 1000 * draw(st.sampled_from([1, 0.5]))


@given(scored(), st.floats(0.01, 0.99))
@few
def test_figures_are_scikit_learns(case, threshold):
    y_true, p_all = case
    called = p_all >= threshold
    found = cell_metrics(y_true, p_all, threshold)
    expected = {
        "auroc": oracle.roc_auc_score(y_true, p_all),
        "sensitivity": oracle.recall_score(y_true, called),
        "specificity": oracle.recall_score(y_true, called, pos_label=0),
        "accuracy": oracle.accuracy_score(y_true, called),
        "f1": oracle.f1_score(y_true, called),
        "weighted_f1": oracle.f1_score(y_true, called, average="weighted"),
        "weighted_precision": oracle.precision_score(y_true, called, average="weighted", zero_division=0),
        "weighted_recall": oracle.recall_score(y_true, called, average="weighted"),
        "brier": oracle.brier_score_loss(y_true, p_all),
    }
    assert 0 <= found.pop("ece") <= 1  # by hand below
    assert found == pytest.approx(expected)


@given(scored())
@few
def test_auroc_turns_with_the_labels_and_ignores_scale(case):
    y_true, p_all = case
    assert auroc(1 - y_true, p_all) == pytest.approx(1 - auroc(y_true, p_all))
    assert auroc(y_true, np.exp(3 * p_all)) == pytest.approx(auroc(y_true, p_all))


def test_auroc_of_one_class_is_unknown():
    assert np.isnan(auroc([1, 1], [0.1, 0.9])) and np.isnan(auroc([0, 0], [0.1, 0.9]))


def test_calibration_error_by_hand():
    def error(y_true, p_all):
        return cell_metrics(y_true, p_all, 0.5)["ece"]

    assert error([0, 1, 1, 0], [0.0, 1.0, 1.0, 0.0]) == 0
    assert error([1, 0], [0.0, 1.0]) == 1
    assert error([1, 0, 0, 0], [0.5] * 4) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    p_all = rng.random(200_000)
    assert error(rng.random(200_000) < p_all, p_all) < 0.01


@pytest.fixture(scope="module")
def subjects_cells():
    rng = np.random.default_rng(1)
    subjects = np.repeat([f"{i}" for i in range(8)] + [f"H{i}" for i in range(8)], 20)
    y_true = np.array([0 if s.startswith("H") else 1 for s in subjects])
    effect = dict(zip(np.unique(subjects), rng.normal(0, 1, 16), strict=True))
    logit = 1.5 * (y_true - 0.5) + np.array([effect[s] for s in subjects]) + rng.normal(0, 1, len(subjects))
    return y_true, 1 / (1 + np.exp(-logit)), subjects


def test_bootstrap_brackets_the_estimate_and_repeats(subjects_cells):
    y_true, p_all, subjects = subjects_cells
    found = bootstrap_metrics(y_true, p_all, subjects, subjects, 0.5, draws=300)
    assert found == bootstrap_metrics(y_true, p_all, subjects, subjects, 0.5, draws=300)
    right = (p_all >= 0.5) == y_true
    plain = cell_metrics(y_true, p_all, 0.5)
    plain["subject_accuracy"] = np.mean([right[subjects == s].mean() for s in set(subjects)])
    for name, (value, low, high) in found.items():
        assert value == pytest.approx(plain[name], abs=1e-4)
        assert low < high and (low <= value <= high or name == "ece")  # a bootstrap's ECE is biased upwards


def test_interval_by_subject_is_wider_than_by_cell(subjects_cells):
    y_true, p_all, subjects = subjects_cells
    each = np.array([f"{s}/{i}" for i, s in enumerate(subjects)])
    by_subject, by_cell = (bootstrap_metrics(y_true, p_all, subjects, of, 0.5, draws=300)["auroc"] for of in (subjects, each))
    assert by_subject[2] - by_subject[1] > 1.5 * (by_cell[2] - by_cell[1])


def test_subjects_of_a_group_are_drawn_as_one(subjects_cells):
    """The same figures; intervals as if the group were one subject, but that each of its subjects counts in their mean."""
    y_true, p_all, subjects = subjects_cells
    groups = np.where(np.isin(subjects, ["H1", "H2", "H3"]), "H1+H2+H3", subjects)
    apart = bootstrap_metrics(y_true, p_all, subjects, subjects, 0.5, draws=300)
    together = bootstrap_metrics(y_true, p_all, subjects, groups, 0.5, draws=300)
    as_one = bootstrap_metrics(y_true, p_all, groups, groups, 0.5, draws=300)
    for name, (value, *interval) in together.items():
        assert value == apart[name][0], name
        assert interval != apart[name][1:] or name == "sensitivity", name
        assert (interval == as_one[name][1:]) == (name != "subject_accuracy"), name
    rng, right = np.random.default_rng(1), (p_all >= 0.5) == y_true
    share = {s: right[subjects == s].mean() for s in subjects}
    members = {g: sorted(set(subjects[groups == g])) for g in groups}
    classes = [sorted(g for g in members if g.startswith("H") == healthy) for healthy in (True, False)]
    drawn = []
    for _ in range(4000):
        drawn.append(np.mean([share[s] for of in classes for g in rng.choice(of, len(of)) for s in members[g]]))
    assert together["subject_accuracy"][1:] == pytest.approx(np.percentile(drawn, _ends(6)), abs=0.01)


def test_few_groups_give_wider_percentiles():
    assert _ends(10**6) == pytest.approx([2.5, 97.5], abs=1e-3)
    lows = [_ends(n)[0] for n in (1.02, 2, 4, 14, 50)]
    assert lows[0] == pytest.approx(0, abs=1e-3) and lows == sorted(lows)
    # by hand: Student's t .975 with 13 degrees is 2.1604; the normal share below -2.1604 * sqrt(14 / 13) is .01249
    assert _ends(14) == pytest.approx([1.249, 98.751], abs=2e-3)


def test_of_one_person_of_a_class_nothing_is_known_of_how_persons_differ(subjects_cells):
    """All that a figure may be, instead of an interval of no width."""
    y_true, p_all, subjects = subjects_cells
    groups = np.where(y_true == 0, "H", subjects)  # all HEM subjects share pictures
    found = bootstrap_metrics(y_true, p_all, subjects, groups, 0.5, draws=50)
    apart = bootstrap_metrics(y_true, p_all, subjects, subjects, 0.5, draws=50)
    assert found == {name: [value, 0, 1] for name, (value, *_) in apart.items()}
    for value, *interval in paired_difference(y_true, p_all, p_all**2, groups, draws=50).values():
        assert interval == [-1, 1] and -1 < value < 1
    assert {(row["low"], row["high"]) for row in reliability(y_true, p_all, groups, draws=50)} == {(0, 1)}


def test_intervals_of_few_subjects_hold_the_truth_nearly_as_often_as_they_say():
    """Sensitivity of persons who differ, six a class: plain percentiles hold it in eight of ten."""
    rng, truth = np.random.default_rng(0), 0.8
    subjects = np.repeat([f"{kind}{i}" for kind in "AH" for i in range(6)], 50)
    y_true = np.array([int(s[0] == "A") for s in subjects])
    held = {"plain": 0, "given": 0}
    for _ in range(400):
        share = np.repeat(rng.beta(8, 2, 12), 50)
        p_all = np.where((rng.random(600) < share) == (y_true == 1), 0.9, 0.1)
        _, low, high = bootstrap_metrics(y_true, p_all, subjects, subjects, 0.5, draws=400)["sensitivity"]
        of_each = np.array([(p_all[subjects == s] >= 0.5).mean() for s in dict.fromkeys(subjects[y_true == 1])])
        plain = np.percentile(rng.choice(of_each, (400, 6)).mean(1), [2.5, 97.5])
        held["given"] += low <= truth <= high
        held["plain"] += plain[0] <= truth <= plain[1]
    assert held["given"] > 0.9 * 400 > 0.88 * 400 > held["plain"]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 6.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 60_000)
    y_true = rng.random(60_000) < 1 / (1 + np.exp(-logit))
    assert fit_temperature(y_true, logit * temperature) == pytest.approx(temperature, rel=0.03)


def persons(rng, n=25, cells=40, spread=1.0):
    """Logits of n ALL and n HEM subjects, normal around +1 and -1; subjects differ, cells of one less."""
    subjects = np.repeat(np.arange(2 * n), rng.integers(5, 2 * cells, 2 * n))
    y_true = (subjects < n).astype(int)
    logit = 2 * y_true - 1 + rng.normal(0, 0.8, 2 * n)[subjects] + rng.normal(0, spread, len(subjects))
    return y_true, logit, subjects.astype(str)


def test_youden_threshold_errs_less_than_the_highest_tooth():
    """The best place is 0; the plain maximum over the same cells is the oracle that it has to beat."""
    errors = {"smoothed": [], "plain": []}
    for seed in range(40):
        y_true, logit, subjects = persons(np.random.default_rng(seed))
        fpr, tpr, thresholds = oracle.roc_curve(y_true, logit)
        errors["smoothed"].append(youden_threshold(y_true, logit, subjects))
        errors["plain"].append(thresholds[(tpr - fpr).argmax()])
    smoothed, plain = (np.sqrt(np.mean(np.square(errors[rule]))) for rule in ("smoothed", "plain"))
    assert smoothed < 0.8 * plain and smoothed < 0.3


@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
@few
def test_youden_threshold_moves_with_the_logits(seed, scale, shift):
    y_true, logit, subjects = persons(np.random.default_rng(seed), n=6)
    found = youden_threshold(y_true, logit, subjects)
    assert logit.min() < found < logit.max()
    step = (logit.max() - logit.min()) / 400
    assert youden_threshold(y_true, scale * logit + shift, subjects) == pytest.approx(scale * found + shift, abs=scale * step)
    # the classes' names do not matter
    assert youden_threshold(1 - y_true, -logit, subjects) == pytest.approx(-found, abs=step)


def test_youden_threshold_lies_in_the_gap_and_one_class_has_none():
    y_true, subjects = np.repeat([0, 1], 50), np.repeat(["a", "b", "c", "d"], 25)
    logit = np.r_[np.linspace(-4, -3, 50), np.linspace(5, 6, 50)]
    assert youden_threshold(y_true, logit, subjects) == pytest.approx(1.0, abs=0.5)
    assert youden_threshold(np.ones(100, int), logit, subjects) == 0
    assert youden_threshold(y_true, np.full(100, 2.0), subjects) == pytest.approx(2.0)


def test_reliability_counts_every_cell_and_finds_the_shares():
    p_all = np.repeat([0.05, 0.45, 0.95, 1.0], [40, 20, 10, 30])
    y_true = np.r_[np.ones(4), np.zeros(36), np.ones(10), np.zeros(10), np.ones(40)].astype(int)
    subjects = [f"{'A' if y else 'H'}{i % 3}" for i, y in enumerate(y_true)]
    rows = reliability(y_true, p_all, subjects)
    assert [row["n"] for row in rows] == [40, 20, 40]
    assert [row["share"] for row in rows] == pytest.approx([0.1, 0.5, 1.0])
    assert [row["p_all"] for row in rows] == pytest.approx([0.05, 0.45, 0.9875])
    assert all(0 <= row["low"] <= row["share"] <= row["high"] <= 1 for row in rows)
    assert rows[0]["low"] < 0.1 < rows[0]["high"]


def test_reliability_interval_is_that_of_subjects():
    """Many cells of two persons tell no more than two persons can: the interval does not shrink with the cells."""
    width = []
    for n in (10, 1000):
        y_true, p_all = np.repeat([1, 1, 0, 0], n), np.tile([0.41, 0.42], 2 * n)
        row = reliability(y_true, p_all, np.repeat(["A1", "A2", "H1", "H2"], n * np.array([1, 1, 1, 1])))[0]
        width.append((row["share"], row["low"], row["high"]))
    assert width[0] == pytest.approx(width[1])


def test_reliability_of_drawn_subjects_is_the_bootstraps():
    """Against drawing subjects one by one, in plain Python."""
    rng = np.random.default_rng(1)
    subjects = np.repeat([f"A{i}" for i in range(6)] + [f"H{i}" for i in range(6)], rng.integers(3, 30, 12))
    y_true = np.array([int(s[0] == "A") for s in subjects])
    p_all = np.full(len(y_true), 0.5)
    row = reliability(y_true, p_all, subjects, draws=4000)[0]
    size = {s: int((subjects == s).sum()) for s in set(subjects)}
    groups = [sorted(s for s in size if s[0] == kind) for kind in "AH"]
    effective = (sum(size[s] for s in group) ** 2 / sum(size[s] ** 2 for s in group) for group in groups)
    shares = []
    for _ in range(4000):
        n_all, n_hem = (sum(size[s] for s in rng.choice(group, 6)) for group in groups)
        shares.append(n_all / (n_all + n_hem))
    assert (row["low"], row["high"]) == pytest.approx(np.percentile(shares, _ends(min(effective))), abs=0.02)


def test_paired_difference_is_that_of_the_same_subjects_drawn_twice(subjects_cells):
    y_true, p_a, subjects = subjects_cells
    p_b = np.clip(p_a + np.where(y_true == 1, 0.05, -0.02), 0, 1)
    found = paired_difference(y_true, p_a, p_b, subjects, thresholds=(0.5, 0.45), draws=4000)
    before, after = cell_metrics(y_true, p_a, 0.5), cell_metrics(y_true, p_b, 0.45)
    rng, names = np.random.default_rng(1), np.unique(subjects)
    rows_of = {s: np.flatnonzero(subjects == s) for s in names}
    groups = [[s for s in names if y_true[rows_of[s][0]] == value] for value in (0, 1)]
    drawn = []
    for _ in range(1000):
        rows = np.concatenate([rows_of[s] for group in groups for s in rng.choice(group, len(group))])
        a, b = cell_metrics(y_true[rows], p_a[rows], 0.5), cell_metrics(y_true[rows], p_b[rows], 0.45)
        drawn.append([b[name] - a[name] for name in found])
    for i, (name, (gap, low, high)) in enumerate(found.items()):
        assert gap == pytest.approx(after[name] - before[name], abs=1e-4)
        assert (low, high) == pytest.approx(np.percentile([row[i] for row in drawn], _ends(8)), abs=0.15 * (high - low))
    assert all(v == [0, 0, 0] for v in paired_difference(y_true, p_a, p_a, subjects).values())
