"""Scores of a classification into two classes, calibration, and the threshold chosen on validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import metrics

BINS = 10  # of the reliability diagram


def average_precision(truth: np.ndarray, probability: np.ndarray) -> float | None:
    """Average precision of class 1; None where the truth has one class only."""
    return float(metrics.average_precision_score(truth, probability)) if _both(truth) else None


def roc_auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve of class 1; None where the truth has one class only."""
    return float(metrics.roc_auc_score(truth, score)) if _both(truth) else None


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """Mean of the recalls of both classes; None where the truth has one class only."""
    classes = np.asarray(truth) > 0.5, np.asarray(predicted).astype(bool)
    return float(metrics.balanced_accuracy_score(*classes)) if _both(truth) else None


def choose_threshold(truth: np.ndarray, probability: np.ndarray) -> float:
    """The probability from which on a composition is called class 1: best F1 of class 1 on validation.

    Half-way between neighbouring probabilities; of equally good ones the highest. 0.5 where the truth has one
    class only.
    """
    if not _both(truth):
        return 0.5
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(truth) + 1) + truth.sum())
    ranked = probability[order]
    last = np.append(ranked[:-1] != ranked[1:], True)  # a threshold does not part equal probabilities
    best = int(np.flatnonzero(last)[np.argmax(f1[last])])
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + below) / 2)


def class_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Accuracy, balanced accuracy, the confusion matrix, and precision, recall and F1.

    Args:
        truth: (n,) classes 0 and 1.
        predicted: (n,) likewise.

    Returns:
        `precision`, `recall` and `f1` have the entries negative, positive, macro and weighted (by support,
        as in the report); 0 where a class is never predicted. `confusion` is [[TN, FP], [FN, TP]].
    """
    truth, predicted = np.asarray(truth).astype(int), np.asarray(predicted).astype(int)
    found: dict[str, Any] = {
        "n": len(truth),
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": balanced_accuracy(truth, predicted),
        "confusion": metrics.confusion_matrix(truth, predicted, labels=[0, 1]).tolist(),
    }
    for average in (None, "macro", "weighted"):
        values = metrics.precision_recall_fscore_support(
            truth, predicted, labels=[0, 1], average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            entry = found.setdefault(name, {})
            if average is None:
                entry |= {"negative": float(value[0]), "positive": float(value[1])}
            else:
                entry[average] = float(value)
    return found


def ranking_scores(truth: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    """Average precision and area under the ROC curve; None where the truth has one class only."""
    return {"average_precision": average_precision(truth, score), "roc_auc": roc_auc(truth, score)}


def calibration(truth: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Brier score, expected calibration error, and the reliability diagram in bins of equal width.

    Returns:
        `bins`: for each, its number of compositions, mean probability and share of class 1 (None if empty).
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    rows, error = [], 0.0
    for number in range(BINS):
        chosen = place == number
        n = int(chosen.sum())
        mean = float(probability[chosen].mean()) if n else None
        share = float(truth[chosen].mean()) if n else None
        if mean is not None and share is not None:
            error += n / len(truth) * abs(mean - share)
        rows.append({"n": n, "probability": mean, "share": share})
    return {"brier": float(np.square(probability - truth).mean()), "ece": error, "bins": rows}


def _both(truth: np.ndarray) -> bool:
    return 0 < np.asarray(truth).sum() < len(truth)
