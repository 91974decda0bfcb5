"""Runs of the composition study: their predictions, the scores made from them, and the tables over all runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.evaluation.classification import (
    calibration,
    choose_threshold,
    class_scores,
    ranking_scores,
)
from castbench.evaluation.metrics import scores
from castbench.provenance import atomic_path

log = logging.getLogger(__name__)

PARTS = ("validation", "test")


def write_composition_predictions(
    folder: Path, parts: dict[str, tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]]
) -> None:
    """Write predictions.parquet: formula, split, and {target}_true and {target}_pred of every target.

    Args:
        folder: of the run.
        parts: formulas, true values and predictions, in units or as classes and probabilities, of each part
            of the split.
    """
    tables = []
    for part, (formulas, truth, predicted) in parts.items():
        columns: dict[str, Any] = {"formula": formulas, "split": [part] * len(formulas)}
        for target in truth:
            columns[f"{target}_true"] = pa.array(truth[target], pa.float64(), from_pandas=True)
            columns[f"{target}_pred"] = pa.array(predicted[target], pa.float64(), from_pandas=True)
        tables.append(pa.table(columns))
    with atomic_path(folder / "predictions.parquet") as partial:
        pq.write_table(pa.concat_tables(tables).combine_chunks(), partial)


def score_run(predictions: pd.DataFrame, regression: list[str], classification: list[str]) -> dict[str, Any]:
    """Scores of a run, for its metrics.json, from its predictions alone.

    Returns:
        {target: {"validation": ..., "test": ...}}. A class has in addition the `threshold` chosen on
        validation; its scores stand under "at_half" (probability 0.5) and "at_threshold", beside the ranking
        scores and the calibration.
    """
    found: dict[str, Any] = {}
    for target in regression:
        found[target] = {part: scores(*pair(predictions, target, part)) for part in PARTS}
    for target in classification:
        threshold = choose_threshold(*pair(predictions, target, "validation"))
        found[target] = {"threshold": threshold}
        for part in PARTS:
            truth, probability = pair(predictions, target, part)
            found[target][part] = {
                "at_half": class_scores(truth, probability >= 0.5),
                "at_threshold": class_scores(truth, probability >= threshold),
                **ranking_scores(truth, probability),
                "calibration": calibration(truth, probability),
            }
    return found


def pair(predictions: pd.DataFrame, target: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted values (n,) of a part, where the true one is known."""
    chosen = predictions[predictions["split"] == part].dropna(subset=[f"{target}_true"])
    return chosen[f"{target}_true"].to_numpy(), chosen[f"{target}_pred"].to_numpy()


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run; status "missing" where there is none."""
    file = folder / "metrics.json"
    if not file.exists():
        return {"status": "missing", "reason": "no metrics.json"}
    return json.loads(file.read_text(encoding="utf-8"))
