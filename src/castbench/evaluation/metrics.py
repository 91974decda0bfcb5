"""Errors of predictions, in the unit of the target."""

import numpy as np
from numpy.typing import ArrayLike


def _residuals(truth: ArrayLike, predicted: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Truth and predicted - truth as float64, both (n,).

    Raises:
        ValueError: no values, or not as many predictions as values.
    """
    truth, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != predicted.shape or not truth.size:
        raise ValueError(
            f"metrics need two vectors of one length > 0, got {truth.shape} and {predicted.shape}"
        )
    return truth, predicted - truth


def mae(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error."""
    return float(np.abs(_residuals(truth, predicted)[1]).mean())


def rmse(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.square(_residuals(truth, predicted)[1]).mean()))


def r2(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Coefficient of determination 1 - SS_residual / SS_total; None where the truth does not vary."""
    truth, residuals = _residuals(truth, predicted)
    total = np.square(truth - truth.mean()).sum()
    return float(1 - np.square(residuals).sum() / total) if total > 0 else None


def scores(truth: ArrayLike, predicted: ArrayLike) -> dict[str, float | None]:
    """MAE, RMSE and R2: the `test` and `validation` entries of a run's record."""
    return {"mae": mae(truth, predicted), "rmse": rmse(truth, predicted), "r2": r2(truth, predicted)}
