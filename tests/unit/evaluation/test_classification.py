"""Scores of classes: by hand, and the report's own numbers from its confusion matrix."""

import numpy as np
import pytest

from castbench.evaluation.classification import (
    average_precision,
    calibration,
    choose_threshold,
    class_scores,
    ranking_scores,
)
from castbench.evaluation.compositions import report_row
from castbench.evaluation.records import read_edm_report

TRUTH = np.array([0, 0, 0, 1, 1, 0, 1, 0.0])
PROBABILITY = np.array([0.1, 0.2, 0.6, 0.7, 0.4, 0.3, 0.9, 0.05])


def test_scores_by_hand():
    found = class_scores(TRUTH, PROBABILITY >= 0.5)
    assert found["confusion"] == [[4, 1], [1, 2]]
    assert found["accuracy"] == 6 / 8
    assert found["balanced_accuracy"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["precision"] == pytest.approx(
        {"negative": 0.8, "positive": 2 / 3, "macro": (0.8 + 2 / 3) / 2, "weighted": (5 * 0.8 + 2) / 8}
    )
    assert found["f1"]["positive"] == pytest.approx(2 / 3)


def test_a_class_that_is_never_predicted_scores_zero():
    found = class_scores(TRUTH, np.zeros(8))
    assert (found["precision"]["positive"], found["recall"]["positive"], found["f1"]["positive"]) == (0, 0, 0)
    assert found["balanced_accuracy"] == 0.5


def test_one_class_only_has_no_ranking():
    assert ranking_scores(np.ones(3), PROBABILITY[:3]) == {"average_precision": None, "roc_auc": None}
    assert class_scores(np.ones(3), np.ones(3))["balanced_accuracy"] is None
    assert choose_threshold(np.ones(3), PROBABILITY[:3]) == 0.5


def test_the_threshold_has_the_best_f1():
    threshold = choose_threshold(TRUTH, PROBABILITY)
    f1 = [class_scores(TRUTH, cut <= PROBABILITY)["f1"]["positive"] for cut in [*PROBABILITY, 1]]
    assert class_scores(TRUTH, threshold <= PROBABILITY)["f1"]["positive"] == max(f1)
    assert 0.3 < threshold < 0.4  # half-way between the neighbours


def test_equal_probabilities_are_not_parted():
    truth = np.array([1, 0, 1, 0, 0.0])
    probability = np.array([0.5, 0.5, 0.5, 0.2, 0.1])
    assert choose_threshold(truth, probability) == pytest.approx(0.35)


def test_ranking_by_hand():
    assert average_precision(TRUTH, PROBABILITY) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert ranking_scores(TRUTH, PROBABILITY)["roc_auc"] == pytest.approx(14 / 15)


def test_calibration_by_hand():
    found = calibration(np.array([0, 1, 1, 0.0]), np.array([0.05, 0.15, 1.0, 0.92]))
    assert [row["n"] for row in found["bins"]] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found["bins"][9] == {"n": 2, "probability": pytest.approx(0.96), "share": 0.5}
    assert found["bins"][2] == {"n": 0, "probability": None, "share": None}
    assert found["ece"] == pytest.approx(0.25 * 0.05 + 0.25 * 0.85 + 0.5 * 0.46)
    assert found["brier"] == pytest.approx((0.05**2 + 0.85**2 + 0.92**2) / 4)


def test_the_reports_numbers_are_weighted_means_of_its_matrix():
    known = read_edm_report()
    counts = [
        int(known[k]) for k in ("true_negatives", "false_positives", "false_negatives", "true_positives")
    ]
    pairs = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], counts, axis=0)
    found = class_scores(pairs[:, 0], pairs[:, 1])
    assert found["accuracy"] == pytest.approx(known["accuracy"], abs=5e-5)
    for kind in ("precision", "recall", "f1"):
        assert found[kind]["weighted"] == pytest.approx(known[f"{kind}_weighted"], abs=5e-5)
    assert report_row()["f1_positive_mean"] == pytest.approx(0.360, abs=1e-3)
    assert report_row()["f1_macro_mean"] == pytest.approx(0.612, abs=1e-3)


def test_of_equally_good_thresholds_the_highest_is_taken():
    truth, probability = np.array([1, 0, 0, 1, 0.0]), np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    f1 = [class_scores(truth, probability >= cut)["f1"]["positive"] for cut in (0.85, 0.35)]
    assert f1[0] == f1[1]
    assert choose_threshold(truth, probability) == pytest.approx(0.85)
