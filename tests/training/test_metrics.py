import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from training.metrics import (
    auroc,
    bootstrap_metrics,
    cell_metrics,
    expected_calibration_error,
    fit_temperature,
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
        "brier": oracle.brier_score_loss(y_true, p_all),
    }
    assert found.pop("ece") == pytest.approx(expected_calibration_error(y_true, p_all))
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
    assert expected_calibration_error([0, 1, 1, 0], [0.0, 1.0, 1.0, 0.0]) == 0
    assert expected_calibration_error([1, 0], [0.0, 1.0]) == 1
    assert expected_calibration_error([1, 0, 0, 0], [0.5] * 4) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    p_all = rng.random(200_000)
    assert expected_calibration_error(rng.random(200_000) < p_all, p_all) < 0.01


@pytest.fixture(scope="module")
def subjects_cells():
    rng = np.random.default_rng(1)
    subjects = np.repeat([f"{i}" for i in range(8)] + [f"H{i}" for i in range(8)], 20)
    y_true = np.array([0 if s.startswith("H") else 1 for s in subjects])
    effect = dict(zip(np.unique(subjects), rng.normal(0, 1, 16), strict=True))
    logit = 1.5 * (y_true - 0.5) + np.array([effect[s] for s in subjects]) + rng.normal(0, 1, len(subjects))
    return y_true, 1 / (1 + np.exp(-logit)), subjects


def test_bootstrap_brackets_the_estimate_and_repeats(subjects_cells):
    found = bootstrap_metrics(*subjects_cells, 0.5, draws=300)
    assert found == bootstrap_metrics(*subjects_cells, 0.5, draws=300)
    plain = cell_metrics(*subjects_cells[:2], 0.5)
    for name, (value, low, high) in found.items():
        assert value == pytest.approx(plain[name], abs=1e-4)
        assert low < high and (low <= value <= high or name == "ece")  # a bootstrap's ECE is biased upwards


def test_interval_by_subject_is_wider_than_by_cell(subjects_cells):
    y_true, p_all, subjects = subjects_cells
    by_subject = bootstrap_metrics(y_true, p_all, subjects, 0.5, draws=300)["auroc"]
    by_cell = bootstrap_metrics(y_true, p_all, np.array([f"{s}/{i}" for i, s in enumerate(subjects)]), 0.5, draws=300)["auroc"]
    assert by_subject[2] - by_subject[1] > 1.5 * (by_cell[2] - by_cell[1])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 6.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 60_000)
    y_true = rng.random(60_000) < 1 / (1 + np.exp(-logit))
    assert fit_temperature(y_true, logit * temperature) == pytest.approx(temperature, rel=0.03)


@given(scored())
@few
def test_youden_threshold_is_the_best_there_is(case):
    y_true, p_all = case
    p_all = 0.02 + 0.95 * p_all
    subjects = np.array([f"{y}{i % 5}" for i, y in enumerate(y_true)])
    sizes = dict(zip(*np.unique(subjects, return_counts=True), strict=True))
    weight = np.array([1 / sizes[s] for s in subjects])

    def youden(threshold):
        called = p_all >= threshold
        return sum(np.average(called[y_true == y] == y, weights=weight[y_true == y]) for y in (0, 1))

    best = max(youden(t) for t in [*p_all, 1.0])
    threshold = youden_threshold(y_true, p_all, subjects)
    assert 0.01 <= threshold <= 0.99 and youden(threshold) == pytest.approx(max(best, 1.0))
