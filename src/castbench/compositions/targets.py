"""Target values of compositions: numbers, and classes by a threshold."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from castbench.labels import CLASS_TARGETS
from castbench.materials.targets import column_values, target_values


def class_values(table: pa.Table, target: str, threshold: float) -> np.ndarray:
    """Classes (n,) float64 of `target`: 1 at or below `threshold` (in its unit), NaN where it is missing."""
    values = column_values(table, CLASS_TARGETS[target].column)
    return np.where(np.isnan(values), np.nan, (values <= threshold).astype(np.float64))


def composition_values(
    table: pa.Table, regression: list[str], classification: dict[str, float]
) -> dict[str, np.ndarray]:
    """Values (n,) of every target, NaN where missing: numbers in their unit, then classes 0 and 1."""
    numbers = {target: target_values(table, target) for target in regression}
    return numbers | {target: class_values(table, target, cut) for target, cut in classification.items()}


def threshold_text(target: str, threshold: float) -> str:
    """The rule of a class in words: "stable: energy above hull ≤ 0 eV/atom"."""
    known = CLASS_TARGETS[target]
    return f"{known.positive}: {known.column.replace('_', ' ')} ≤ {threshold:g} {known.unit}"
