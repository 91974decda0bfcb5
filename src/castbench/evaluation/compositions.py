"""Runs of the composition study: predictions, the scores made from them, and the tables over all runs."""

from __future__ import annotations

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
from castbench.evaluation.records import (
    ordered_composition_models,
    read_edm_report,
    read_json,
    read_run,
    write_csv,
)
from castbench.evaluation.statistics import mean_interval
from castbench.labels import TARGETS
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


# --- tables over all runs -------------------------------------------------------------------------

NUMBERS = ("mae", "rmse", "r2")
AVERAGES = ("negative", "positive", "macro", "weighted")
CLASS_COLUMNS = (
    "accuracy", "balanced_accuracy",
    *(f"{kind}_{average}" for kind in ("precision", "recall", "f1") for average in AVERAGES),
)  # fmt: skip
RANKING = ("average_precision", "roc_auc", "brier", "ece")
OURS, REPORT = "edm_transformer", "edm_report"


def tabulate_compositions(settings: dict[str, Any], results: Path, output: Path) -> None:
    """Write the tables of the composition study.

    composition_gap: errors of every number and model, mean and sample standard deviation over seeds, and the
    paired difference to the EDM Transformer; composition_stability: scores of every class, model and cut;
    composition_calibration: bins of the reliability diagram; composition_runs: a row a run; enrichment: the
    screening. The report's own values stand in rows of the model "edm_report".

    Args:
        settings: {models, structure_models, regression, classification, seeds, targets, ...}.
        results: folder of the data set.
        output: folder of the tables.
    """
    runs = read_runs(settings, results)
    write_csv(output / "composition_runs.csv", run_table(runs, settings))
    write_csv(output / "composition_gap.csv", number_table(runs, settings))
    write_csv(output / "composition_stability.csv", class_table(runs, settings))
    write_csv(output / "composition_calibration.csv", calibration_table(runs, settings))
    screened = read_json(results / "screening" / "validation.json")
    write_csv(output / "enrichment.csv", enrichment_table(screened, settings["seeds"]))


def read_runs(settings: dict[str, Any], results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(model, seed) -> record, with `predictions` where it is finished. Structure models are put together."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for model in ordered_composition_models(settings):
        for seed in settings["seeds"]:
            if model in settings["structure_models"]:
                found[model, seed] = read_structure_run(settings, results, model, seed)
                continue
            folder = results / "composition_runs" / model / str(seed)
            record = read_run(folder) | {"cost": read_json(folder / "cost.json")}
            if record["status"] == "finished":
                record["predictions"] = pd.read_parquet(folder / "predictions.parquet")
            found[model, seed] = record
    return found


def read_structure_run(settings: dict[str, Any], results: Path, model: str, seed: int) -> dict[str, Any]:
    """The runs of a structure model on gap and energy above hull, as one record of the composition study.

    Such a model has no class of its own: the lower the energy above hull that it predicts, the more stable; a
    threshold for it is chosen on validation. That is a ranking, not a probability, and has no calibration.
    """
    known = pd.read_parquet(results / "compositions.parquet").set_index("material_id")
    cut = settings["classification"]["stability"]
    record: dict[str, Any] = {"status": "missing", "reason": "no run", "scores": {}, "cost": {}}
    frames, unfinished = [], {}
    for target in ("band_gap", "energy_above_hull"):
        folder = results / "runs" / target / model / str(seed)
        own = read_run(folder)
        if own["status"] != "finished":
            if target in settings["targets"]:
                unfinished = {"status": own["status"], "reason": f"{target}: {own['reason']}"}
            continue
        frame = pd.read_parquet(folder / "predictions.parquet")
        frame["formula"] = known["formula"].reindex(frame["material_id"]).to_numpy()
        frame = frame.rename(columns={"y_true": f"{target}_true", "y_pred": f"{target}_pred"})
        frames.append(frame.drop(columns="material_id").set_index(["formula", "split"]))
        record |= {"status": "finished", "reason": None, "n": own["n"], "parameters": own["parameters"]}
        cost = read_json(folder / "cost.json")
        record["cost"] = cost | {"seconds": record["cost"].get("seconds", 0) + cost.get("seconds", 0)}
    record |= unfinished  # of two runs, neither hides that the other failed
    if not frames:
        return record
    joined = pd.concat(frames, axis=1).reset_index()
    if "band_gap_true" in joined:
        record["scores"]["band_gap"] = {part: scores(*pair(joined, "band_gap", part)) for part in PARTS}
    if "energy_above_hull_true" in joined:
        joined["stability_true"] = (joined["energy_above_hull_true"] <= cut).astype(float)
        joined["stability_pred"] = -joined["energy_above_hull_pred"]
        threshold = choose_threshold(*pair(joined, "stability", "validation"))
        found: dict[str, Any] = {"threshold": threshold}
        for part in PARTS:
            truth, score = pair(joined, "stability", part)
            found[part] = {
                "at_threshold": class_scores(truth, score >= threshold),
                **ranking_scores(truth, score),
            }
        record["scores"]["stability"] = found
    return record | {"predictions": joined}


def _finished(
    runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any], model: str, target: str
) -> list[dict[str, Any]]:
    records = (runs[model, seed] for seed in settings["seeds"])
    return [record for record in records if target in record.get("scores", {})]


def _mean_std(values: list[float | None]) -> tuple[float, float]:
    known = np.array([value for value in values if value is not None], dtype=float)
    return (
        float(known.mean()) if len(known) else float("nan"),
        float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
    )


def number_table(runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """A row a number and model: test MAE, RMSE and R2 over seeds, and MAE minus the EDM Transformer's.

    The difference is that of the seeds' mean errors on the same formulas, with a 95 % bootstrap interval.
    """
    rows = []
    for target in settings["regression"]:
        for model in ordered_composition_models(settings):
            records = _finished(runs, settings, model, target)
            row: dict[str, Any] = {"target": target, "unit": TARGETS[target].unit, "model": model}
            row |= {"finished": len(records), "expected": len(settings["seeds"])}
            for name in NUMBERS:
                values = [record["scores"][target]["test"][name] for record in records]
                row[f"{name}_mean"], row[f"{name}_std"] = _mean_std(values)
            row["n_test"] = len(pair(records[0]["predictions"], target, "test")[0]) if records else None
            rows.append(row | difference(runs, settings, model, target))
        if target == "band_gap":
            report = {f"{name}_mean": read_edm_report()[name] for name in NUMBERS}
            rows.append({"target": target, "unit": "eV", "model": REPORT, "n_test": 456, **report})
    return pd.DataFrame(rows)


def absolute_errors(records: list[dict[str, Any]], target: str) -> pd.Series:
    """Absolute test error of each formula, mean over runs."""
    found = []
    for record in records:
        frame = record["predictions"].query("split == 'test'").set_index("formula")
        found.append((frame[f"{target}_pred"] - frame[f"{target}_true"]).abs().dropna())
    return pd.concat(found).groupby(level=0).mean() if found else pd.Series(dtype=float)


def difference(
    runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any], model: str, target: str
) -> dict[str, Any]:
    """MAE of a model minus that of the EDM Transformer, on the test formulas and seeds that both have.

    Of fewer than five formulas there is none.
    """
    pairs = [(runs[model, seed], runs.get((OURS, seed), {})) for seed in settings["seeds"]]
    both = [pair for pair in pairs if all(target in record.get("scores", {}) for record in pair)]
    first, second = (absolute_errors([pair[place] for pair in both], target) for place in (0, 1))
    common = first.index.intersection(second.index)
    if model == OURS or common.empty:
        return {"minus_edm": None, "low": None, "high": None, "n_common": None}
    mean, low, high = mean_interval((first[common] - second[common]).to_numpy())
    return {"minus_edm": mean, "low": low, "high": high, "n_common": len(common)}


def class_row(found: dict[str, Any]) -> dict[str, float | None]:
    """Flat scores of `class_scores`."""
    row = {"accuracy": found["accuracy"], "balanced_accuracy": found["balanced_accuracy"]}
    for kind in ("precision", "recall", "f1"):
        row |= {f"{kind}_{average}": found[kind][average] for average in AVERAGES}
    return row


def class_table(runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """A row a class, model and cut (at_half: 0.5; at_threshold: chosen on validation), over seeds."""
    rows = []
    for target, cut in settings["classification"].items():
        for model in ordered_composition_models(settings):
            records = _finished(runs, settings, model, target)
            for kind in ("at_half", "at_threshold"):
                tests = [record["scores"][target]["test"] for record in records]
                flat = [class_row(test[kind]) for test in tests if kind in test]
                if records and not flat:
                    continue
                row: dict[str, Any] = {"target": target, "class_threshold": cut, "model": model, "cut": kind}
                row |= {"finished": len(records), "expected": len(settings["seeds"])}
                row["n_test"] = tests[0]["at_threshold"]["n"] if tests else None
                cuts = [0.5 if kind == "at_half" else r["scores"][target]["threshold"] for r in records]
                cuts = [] if model in settings["structure_models"] else cuts  # theirs is an energy
                row["probability_mean"], row["probability_std"] = _mean_std(cuts)
                for name in CLASS_COLUMNS:
                    row[f"{name}_mean"], row[f"{name}_std"] = _mean_std([scored[name] for scored in flat])
                ranked = [test | test.get("calibration", {}) for test in tests]
                for name in RANKING:
                    row[f"{name}_mean"], row[f"{name}_std"] = _mean_std([test.get(name) for test in ranked])
                rows.append(row)
        if target == "stability":
            rows.append(report_row())
    return pd.DataFrame(rows)


def report_row() -> dict[str, Any]:
    """The report's classification: what it states, the rest from the confusion matrix of its Figure 3."""
    known = read_edm_report()
    counts = [
        known[name] for name in ("true_negatives", "false_positives", "false_negatives", "true_positives")
    ]
    pairs = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], np.array(counts, dtype=int), axis=0)
    scored = class_row(class_scores(pairs[:, 0], pairs[:, 1])) | {
        name: value for name, value in known.items() if name in CLASS_COLUMNS
    }
    row = {"target": "stability", "model": REPORT, "cut": "at_half", "n_test": len(pairs)}
    return row | {f"{name}_mean": value for name, value in scored.items()}


def calibration_table(runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """A row a model, seed and bin of the test part's stability probability."""
    rows = []
    for (model, seed), record in runs.items():
        found = record.get("scores", {}).get("stability", {}).get("test", {}).get("calibration")
        for number, chosen in enumerate(found["bins"] if found else []):
            rows.append({"model": model, "seed": seed, "bin": number, **chosen})
    return pd.DataFrame(rows, columns=["model", "seed", "bin", "n", "probability", "share"])


def run_table(runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """A row a run: status, sizes, scores on test, epochs, parameters, time."""
    rows = []
    for (model, seed), record in runs.items():
        row: dict[str, Any] = {"model": model, "seed": seed}
        row |= {key: record.get(key) for key in ("status", "reason", "best_epoch", "epochs")}
        row["parameters"] = (record.get("parameters") or {}).get("total")
        row["seconds"] = (record.get("cost") or {}).get("seconds")
        for target in settings["regression"]:
            test = record.get("scores", {}).get(target, {}).get("test", {})
            row |= {f"{target}_{name}": test.get(name) for name in NUMBERS}
        for target in settings["classification"]:
            own = record.get("scores", {}).get(target, {})
            test = own.get("test", {})
            row |= {f"{target}_{name}": test.get(name) for name in ("average_precision", "roc_auc")}
            cut = test.get("at_threshold", {})
            row |= {f"{target}_{name}": cut.get(name) for name in ("accuracy", "balanced_accuracy")}
            row |= {
                f"{target}_f1_macro": cut.get("f1", {}).get("macro"),
                f"{target}_threshold": own.get("threshold"),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def enrichment_table(found: dict[str, Any], seeds: list[int]) -> pd.DataFrame:
    """The screening's enrichment in both pools: by the seeds' mean (seed empty), then by each finished."""
    rows = []
    for name in ("in_window", "allowed"):
        pool = found["pools"][name]
        for seed in (None, *(seed for seed in seeds if str(seed) in pool)):
            own = pool["mean" if seed is None else str(seed)]
            areas = {key: own[key] for key in ("roc_auc_pool", "roc_auc_hidden")}
            sizes = {"n_pool": pool["n"], "n_hidden_in_pool": pool["n_hidden"]}
            sizes["n_hidden_stable"] = found["n_hidden_stable"]
            rows += [{"pool": name, "seed": seed, **row, **areas, **sizes} for row in own["enrichment"]]
    return pd.DataFrame(rows)
