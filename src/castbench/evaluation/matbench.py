"""Matbench's scores of its folds, beside the published ones, and results in the matbench package's format."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn import metrics

from castbench.evaluation.records import RESOURCES, ordered_models, read_json, read_run, write_csv
from castbench.labels import FOLDS, MATBENCH, MODELS, fold_name
from castbench.provenance import atomic_path, code_version, package_versions, sha256_json

log = logging.getLogger(__name__)
VERSION = "0.6"  # of the matbench package whose format this is
BENCHMARK = "matbench_v0.1"
NEAR_ZERO = 1e-5  # true values this small take no part in Matbench's relative error
SCORES = {
    "regression": ("mae", "rmse", "mape", "max_error"),
    "classification": ("accuracy", "balanced_accuracy", "f1", "rocauc"),
}
AREA = "rocauc_probabilities"  # the area that the package would give if it took probabilities
MAIN = {"regression": "mae", "classification": "rocauc"}  # what the leaderboard ranks by


def aggregate_matbench(settings: dict[str, Any], results: Path) -> None:
    """Score every fold, and write `tables/matbench.csv`, `tables/matbench_folds.csv` and submissions.

    `matbench/{model}/{seed}/results.json.gz` is what Matbench's leaderboard takes and, unpacked, what
    `MatbenchBenchmark.from_file` of its package reads. It has the tasks whose five folds are finished.

    Args:
        settings: {dataset, targets (tasks), models, structure_encoder, seeds}: they name the runs to expect.
        results: folder of the data set.
    """
    rows: list[dict[str, Any]] = []
    truths = {task: pd.read_parquet(results / "matbench" / f"{task}.parquet") for task in settings["targets"]}
    for model in ordered_models(settings):
        for seed in settings["seeds"]:
            tasks = {}
            for task, truth in truths.items():
                folds = [read_fold(results, task, k, model, seed, truth) for k in range(FOLDS)]
                rows += [row for row, _ in folds]
                if all(data is not None for _, data in folds):
                    tasks[task] = task_result(task, folds, read_config(results, task, model, seed))
                else:
                    lacking = sum(data is None for _, data in folds)
                    log.warning(
                        "%s, %s, seed %d: %d of %d folds not finished; the task is not in results.json.gz",
                        task, model, seed, lacking, FOLDS,
                    )  # fmt: skip
            sent = [
                row for row in rows if (row["model"], row["seed"]) == (model, seed) and row["task"] in tasks
            ]
            filled = sum(row["filled"] for row in sent)
            folder = results / "matbench" / model / str(seed)
            write_results(folder / "results.json.gz", tasks, about(settings, model, seed, filled))
    frame = pd.DataFrame(rows)
    tables = results / "tables"
    write_csv(tables / "matbench_folds.csv", frame)
    write_csv(tables / "matbench.csv", summary(frame, settings))


def read_fold(
    results: Path, task: str, fold: int, model: str, seed: int, truth: pd.DataFrame
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The row of a fold for the table, and its predictions {id: value}; None where the run is not finished.

    Matbench wants a prediction for every record. One without a usable structure or graph gets the mean of the
    training crystals (of classes: their share), and is counted in `filled`.

    Args:
        results: folder of the data set.
        task: of Matbench.
        fold: 0 to 4.
        model: name.
        seed: of the run.
        truth: material_id, value and fold of every record of the task.
    """
    folder = results / "runs" / fold_name(task, fold) / model / str(seed)
    record = read_run(folder)
    kind = MATBENCH[task].task
    row: dict[str, Any] = {"task": task, "fold": fold, "unit": MATBENCH[task].unit}
    row |= {"model": model, "seed": seed, "status": record["status"], "reason": record["reason"]}
    row |= {f"n_{part}": (record.get("n") or {}).get(part) for part in ("train", "validation", "test")}
    row |= {"filled": None, **dict.fromkeys((*SCORES["regression"], *SCORES["classification"], AREA))}
    row |= {"seconds": read_json(folder / "cost.json").get("seconds"), "commit": record.get("commit")}
    if record["status"] != "finished":
        log.warning("run %s/%s/%d: %s, %s; it is a gap in the tables", fold_name(task, fold), model, seed,
                    record["status"], record["reason"])  # fmt: skip
        return row, None
    frame = pd.read_parquet(folder / "predictions.parquet")
    predicted = frame[frame["split"] == "test"].set_index("material_id")["y_pred"]
    test = truth[truth["fold"] == fold].set_index("material_id")["value"]
    predicted = predicted.reindex(test.index)
    row["filled"] = int(predicted.isna().sum())
    if row["filled"]:
        log.warning(
            "%s, %s, seed %d: %d test crystals without a graph get the mean of the training crystals",
            fold_name(task, fold), model, seed, row["filled"],
        )  # fmt: skip
    predicted = predicted.fillna(record["target_mean"])
    row |= score(test.to_numpy(), predicted.to_numpy(), kind)
    if kind == "classification":
        row[AREA] = float(metrics.roc_auc_score(test > 0.5, predicted))
    return row, {str(name): float(value) for name, value in predicted.items()}


def score(truth: np.ndarray, predicted: np.ndarray, kind: str) -> dict[str, float]:
    """Matbench's scores of a fold: probabilities are cut at 0.5, values near zero have no relative error.

    The package cuts them for the area under the ROC curve too (its issues 137 and 181), which is then the
    balanced accuracy: so is every recorded one.

    Args:
        truth: (n,) in the task's unit, or classes 0 and 1.
        predicted: (n,) likewise, or probabilities of class 1.
        kind: "regression" or "classification".
    """
    if kind == "classification":
        classes, called = truth > 0.5, predicted > 0.5
        found = (
            metrics.accuracy_score(classes, called),
            metrics.balanced_accuracy_score(classes, called),
            metrics.f1_score(classes, called, zero_division=0),
            metrics.roc_auc_score(classes, called),
        )
    else:
        error, known = np.abs(predicted - truth), np.abs(truth) > NEAR_ZERO
        relative = error[known] / np.abs(truth[known])
        found = (
            error.mean(),
            np.sqrt(np.square(error).mean()),
            relative.mean() if known.any() else 0.0,
            error.max(),
        )
    return dict(zip(SCORES[kind], map(float, found), strict=True))


def read_config(results: Path, task: str, model: str, seed: int) -> dict[str, Any]:
    """How the folds of a task were trained, as the runs recorded it."""
    config = read_json(results / "runs" / fold_name(task, 0) / model / str(seed) / "config.json")
    keys = ("model", "text", "architecture", "training", "seed")
    return {key: config[key] for key in keys if key in config}


def task_result(
    task: str, folds: Sequence[tuple[dict[str, Any], dict[str, float] | None]], parameters: dict[str, Any]
) -> dict[str, Any]:
    """A finished task as the dictionary of a `MatbenchTask`."""
    names = SCORES[MATBENCH[task].task]
    return {
        "@module": "matbench.task",
        "@class": "MatbenchTask",
        "benchmark_name": BENCHMARK,
        "dataset_name": task,
        "results": {
            f"fold_{k}": {
                "data": data,
                "parameters": parameters,
                "scores": {name: row[name] for name in names},
            }
            for k, (row, data) in enumerate(folds)
        },
    }


def about(settings: dict[str, Any], model: str, seed: int, filled: int) -> dict[str, Any]:
    """What a submission says of itself, freely."""
    known = MODELS[model]
    return {
        "algorithm": f"{known.label} (castbench)",
        "reference": known.source,
        "model": model,
        "seed": seed,
        "dataset": settings["dataset"],
        "commit": code_version(),
        "versions": package_versions(),
        "filled": f"{filled} crystals without a graph have the mean of the training crystals",
    }


def write_results(path: Path, tasks: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Write a submission: the dictionary of a `MatbenchBenchmark`, with the hash that it verifies."""
    content = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": VERSION,
        "tasks": tasks,
        "user_metadata": metadata,
        "benchmark_name": BENCHMARK,
        "datestamp": datetime.now(UTC).strftime("%Y.%m.%d %H:%M.%S"),
    }
    text = json.dumps(content | {"hash": sha256_json(content)}, sort_keys=True, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))


def summary(folds: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """One row a task and model, ours first, then the published ones; columns in the unit of `metric`.

    mean and std (over the folds, ddof = 0 as Matbench has it) of `fold_0` to `fold_4`, each the mean over the
    seeds; NaN where a run of theirs is not finished. `finished` of `expected` runs; `filled` predictions in
    them.
    """
    published = pd.read_csv(RESOURCES / "paper" / "matbench.csv")
    rows = []
    for task in settings["targets"]:
        target = MATBENCH[task]
        metric = MAIN[target.task]
        common = {"task": task, "target": target.label, "metric": metric}
        common["unit"] = target.unit if metric == "mae" else ""
        for model in ordered_models(settings):
            own = folds[(folds["task"] == task) & (folds["model"] == model)]
            done = own["status"] == "finished"
            scores = own[metric].astype(float) if metric in own else pd.Series(np.nan, own.index)
            by_fold = [float(scores[own["fold"] == k].mean(skipna=False)) for k in range(FOLDS)]
            rows.append(
                common
                | {"model": model, "label": MODELS[model].label, "source": "this run"}
                | statistics(by_fold)
                | {"finished": int(done.sum()), "expected": len(own), "filled": own["filled"].sum()}
            )
        for name, group in published[published["task"] == task].groupby("model", sort=False):
            by_fold = group.sort_values("fold")["value"].tolist()
            source = {"model": name, "label": f"{name}, published", "source": group["source"].iloc[0]}
            rows.append(common | source | statistics(by_fold))
    return pd.DataFrame(rows)


def statistics(by_fold: list[float]) -> dict[str, float]:
    """Mean and standard deviation over the folds, and the folds."""
    whole = {"mean": float(np.mean(by_fold)), "std": float(np.std(by_fold))}
    return whole | {f"fold_{k}": value for k, value in enumerate(by_fold)}
