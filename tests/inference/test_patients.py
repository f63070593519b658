import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

import model_zoo
from benchmarks.patients import by_subject, mixtures
from inference.gate import inspect_cell
from inference.images import decode_image
from inference.patients import BLAST_LINE, MIN_CELLS, summarize_patient, wilson_interval
from training.compare import read_predictions

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
few = settings(max_examples=60, deadline=None)


def called(k, n):
    return np.repeat([0.9, 0.1], [k, n - k])


@given(counts)
@few
def test_wilson_is_scipys(count):
    k, n = count
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("k, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="Received"):
        wilson_interval(k, n)


@given(counts)
@few
def test_summary_is_in_order_and_within_bounds(make_card, count):
    k, n = count
    s = summarize_patient(called(k, n), make_card())
    assert (s.n, s.called, s.fraction) == (n, k, k / n)
    assert 0 <= s.low <= s.fraction <= s.high <= 1
    assert 0 <= s.corrected_low <= s.corrected <= s.corrected_high <= 1
    assert s.reason.endswith(".") and s == summarize_patient(called(k, n)[::-1], make_card())
    if n < MIN_CELLS:
        assert s.verdict == "indeterminate"
    elif s.verdict == "consistent with ALL":
        assert s.corrected_low >= BLAST_LINE
    elif s.verdict == "not consistent with ALL":
        assert s.corrected_high < BLAST_LINE
    else:
        assert s.verdict == "indeterminate" and s.corrected_low < BLAST_LINE <= s.corrected_high


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
@few
def test_more_cells_called_never_lower_any_figure(make_card, count):
    k, n = count
    fewer, more = (summarize_patient(called(j, n), make_card()) for j in (k, k + 1))
    for figure in ("fraction", "low", "high"):
        assert getattr(more, figure) > getattr(fewer, figure)
    for figure in ("corrected", "corrected_low", "corrected_high"):
        assert getattr(more, figure) >= getattr(fewer, figure) - 0.01  # a draw of each


def test_verdicts_of_plain_cases(make_card):
    verdict = {k: summarize_patient(called(k, 100), make_card()).verdict for k in (0, 25, 100)}
    assert verdict == {0: "not consistent with ALL", 25: "indeterminate", 100: "consistent with ALL"}


@pytest.mark.parametrize("k", [0, MIN_CELLS - 1])
def test_too_few_cells_answer_nothing(k, make_card):
    summary = summarize_patient(called(k, MIN_CELLS - 1), make_card())
    assert summary.verdict == "indeterminate" and str(MIN_CELLS) in summary.reason
    assert summarize_patient(called(MIN_CELLS, MIN_CELLS), make_card()).verdict == "consistent with ALL"


def test_mostly_noted_cells_answer_nothing(make_card):
    verdict = {k: summarize_patient(called(100, 100), make_card(), noted=k).verdict for k in (50, 51)}
    assert verdict == {50: "consistent with ALL", 51: "indeterminate"}


@pytest.mark.parametrize(("scale", "size"), [(0.5, "small"), (0.7, "small"), (1.0, ""), (1.3, "large")])
def test_cells_at_another_magnification_answer_nothing(scale, size, real_cells, make_card, usual):
    measures = []
    for file in real_cells(40):
        picture = Image.fromarray(decode_image(file.read_bytes(), name=file.name)[0])
        resized = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.BILINEAR)
        measures.append(inspect_cell(np.asarray(resized)).measures)
    summary = summarize_patient(called(40, 40), make_card(data={"usual": usual}), measures=measures)
    assert summary.verdict == ("indeterminate" if size else "consistent with ALL")
    assert (f"unusually {size}" in summary.reason) == bool(size)


@pytest.mark.parametrize(
    ("measure", "values", "said"),
    [
        ("darkness", (0.4, 0.9), ("unusually pale", "unusually dark")),
        ("red", (0.2, 0.4), ("of an unusual colour", "of an unusual colour")),
        ("blue", (0.2, 0.4), ("of an unusual colour", "of an unusual colour")),
    ],
)
def test_cells_in_another_stain_or_light_answer_nothing(measure, values, said, make_card, usual):
    card, middle = make_card(data={"usual": usual}), {name: np.mean(of["person"]) for name, of in usual.items()}
    assert summarize_patient(called(40, 40), card, measures=[list(middle.values())] * 40).verdict == "consistent with ALL"
    for value, how in zip(values, said, strict=True):
        summary = summarize_patient(called(40, 40), card, measures=[list((middle | {measure: value}).values())] * 40)
        assert summary.verdict == "indeterminate" and f"The cells are {how}. Another stain" in summary.reason


def test_correction_takes_out_the_checkpoints_errors(make_card):
    card = make_card(subjects=[["1", 1, 1000, 800], ["H1", 0, 1000, 300]])
    summary = summarize_patient(called(5500, 10_000), card)
    assert summary.corrected == pytest.approx((0.55 - 0.3) / (0.8 - 0.3), abs=0.01)


@pytest.mark.parametrize("n", [8, 60])
def test_corrected_interval_covers_shares_drawn_uniformly(n, make_card):
    rng = np.random.default_rng(n)
    card = make_card(subjects=[["1", 1, 1000, 870], ["H1", 0, 1000, 210]])
    shares = rng.uniform(0, 1, 400)
    summaries = [summarize_patient(called(rng.binomial(n, 0.21 + 0.66 * share), n), card) for share in shares]
    covered = np.mean([s.corrected_low <= share <= s.corrected_high for s, share in zip(summaries, shares, strict=True)])
    assert 0.92 <= covered <= 0.98


def test_few_cells_say_little_even_if_all_are_called_alike(make_card):
    card = make_card(subjects=[["1", 1, 1000, 870], ["H1", 0, 1000, 210]])
    none, every = (summarize_patient(called(k, 8), card) for k in (0, 8))
    assert none.corrected_low < 0.01 and none.corrected_high > BLAST_LINE
    assert every.corrected_high > 0.99 and every.corrected_low < 0.8


def test_a_persons_cells_may_be_misread_like_anyones(make_card):
    card = make_card(subjects=[["1", 1, 100, 90], ["2", 1, 100, 90], ["H1", 0, 100, 10], ["H2", 0, 100, 30]])
    summary = summarize_patient(called(1700, 10_000), card)  # of H1's like a tenth, of H2's like none
    assert summary.corrected_low < 0.01 and summary.corrected_high == pytest.approx((0.17 - 0.1) / 0.8, abs=0.02)


def test_mixtures_are_not_told_to_hold_no_blasts():
    """Of each pair of a person with ALL and a healthy one of C-NMC: 30 in 100 are blasts, and few intervals may miss that."""
    checkpoint = model_zoo.find_checkpoint(model_zoo.default_checkpoint())
    told, held = mixtures(checkpoint.card, by_subject(read_predictions(checkpoint.path)), 0.3, 100)
    assert told["not consistent with ALL"] == 0 and held >= 0.85


@pytest.mark.parametrize("subjects", [[], [["1", 1, 100, 90]], [["1", 1, 15, 14], ["H1", 0, 15, 1]]])
def test_a_network_measured_on_too_few_persons_answers_nothing(subjects, make_card):
    for k in (0, 200):
        summary = summarize_patient(called(k, 200), make_card(subjects=subjects))
        assert summary.verdict == "indeterminate" and "too few persons" in summary.reason
        assert 0 <= summary.corrected_low < summary.corrected_high <= 1


def test_network_that_tells_nothing_apart_answers_nothing(make_card):
    card = make_card(subjects=[["1", 1, 100, 50], ["2", 1, 100, 60], ["H1", 0, 100, 55], ["H2", 0, 100, 65]])
    assert {summarize_patient(called(k, 200), card).verdict for k in (0, 100, 200)} == {"indeterminate"}


def test_a_cell_at_the_operating_point_is_called_as_in_its_row(make_card):
    assert summarize_patient([0.5], make_card()).called == 1  # the card's threshold is 0.5
    for threshold in np.random.default_rng(0).uniform(0.05, 0.95, 50).round(4).tolist():
        card = make_card(operating_points={"default": {"threshold": threshold}})
        for p in np.float32(threshold) + np.float32([-1e-6, 0, 1e-6]):
            assert summarize_patient([p], card).called == (float(p) >= threshold)


@pytest.mark.parametrize("wrong", [[], [0.5, np.nan], [1.0001], [-0.1], [[0.5]], 0.5])
def test_bad_probabilities_are_told(wrong, make_card):
    with pytest.raises(ValueError, match="p_all"):
        summarize_patient(wrong, make_card())


def test_a_held_out_person_of_the_other_class_who_read_alike_forbids_an_answer(make_card):
    odd_healthy = make_card(subjects=[*make_card().subjects, ["H99", 0, 100, 97]])
    summary = summarize_patient(called(95, 100), odd_healthy)
    assert summary.corrected_low >= BLAST_LINE and summary.verdict == "indeterminate" and "97%" in summary.reason
    odd_ill = make_card(subjects=[*make_card().subjects, ["99", 1, 100, 8]])
    summary = summarize_patient(called(1, 100), odd_ill)
    assert summary.corrected_high < BLAST_LINE and summary.verdict == "not consistent with ALL"
    summary = summarize_patient(called(5, 100), odd_ill)
    assert summary.corrected_high < BLAST_LINE and summary.verdict == "indeterminate" and "8%" in summary.reason
