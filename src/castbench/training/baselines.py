"""Baselines of the composition study without gradients: training mean, majority class, random forest."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from castbench.errors import InputError
from castbench.provenance import alone_in, hardware
from castbench.training.compositions import CompositionData, read_compositions, write_composition_run
from castbench.training.records import Result

log = logging.getLogger(__name__)


def fit_baseline(
    settings: dict[str, Any],
    model: str,
    seeds: list[int],
    compositions: Path,
    split: Path,
    features: Path,
    output: Path,
    threads: int,
) -> None:
    """Fit a baseline on the training formulas, a run a seed, with the files of a trained run.

    Args:
        settings: {dataset, max_elements, regression, classification, architecture}; stands as config.json.
        model: "baseline" (training mean; share of class 1 in training, so the majority at 0.5) or
            "random_forest".
        seeds: of the runs; the baseline's are equal.
        compositions: table of aggregate_compositions.
        split: of split_compositions.
        features: table of featurize_compositions.
        output: gets {seed}/.
        threads: cores that the job has.

    Raises:
        InputError: the features are of other formulas.
    """
    data = read_compositions(settings, compositions, split)
    table = pq.read_table(features)
    if table["formula"].to_pylist() != data.formulas:
        raise InputError(f"{features}: other formulas than {compositions}; run featurize_compositions again")
    x = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1)
    for seed in seeds:
        start = time.monotonic()
        predicted = {
            target: _predict(model, settings, data, x, target, seed, threads) for target in data.values
        }
        parts = {
            part: (*data.part(part), {target: found[data.rows[part]] for target, found in predicted.items()})
            for part in ("validation", "test")
        }
        record = {"dataset": settings["dataset"], "model": model, "seed": seed, **data.record()}
        seconds = time.monotonic() - start
        spent = {"seconds": round(seconds, 3), "hardware": hardware() | {"threads": threads, "device": "cpu"}}
        folder = output / str(seed)
        with alone_in(folder):
            write_composition_run(folder, record, settings, Result("finished", cost=spent), parts)


def _predict(
    model: str,
    settings: dict[str, Any],
    data: CompositionData,
    x: np.ndarray,
    target: str,
    seed: int,
    threads: int,
) -> np.ndarray:
    """Values in unit, or probabilities of class 1, of every formula (n,)."""
    values, train = data.values[target], data.rows["train"]
    train = train[np.isfinite(values[train])]
    if model == "baseline":
        return np.full(len(values), values[train].mean())
    options = {"n_estimators": settings["architecture"]["random_forest"]["trees"], "n_jobs": threads}
    if target in settings["classification"]:
        forest = RandomForestClassifier(random_state=seed, class_weight="balanced", **options)
        return forest.fit(x[train], values[train]).predict_proba(x)[:, -1]
    return RandomForestRegressor(random_state=seed, **options).fit(x[train], values[train]).predict(x)
