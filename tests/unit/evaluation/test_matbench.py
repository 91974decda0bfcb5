"""Scores are Matbench's, gaps stay gaps, and the results are in the form that its package verifies."""

import gzip
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics

from castbench.evaluation.matbench import aggregate_matbench, score
from castbench.labels import FOLDS, fold_name
from castbench.provenance import write_json
from castbench.report.matbench import best, cell, kind

JDFT, METAL = "matbench_jdft2d", "matbench_mp_is_metal"
SETTINGS = {"dataset": "invented", "targets": [JDFT, METAL], "models": ["structure_only"], "seeds": [0, 1]}
N = 20


def write_runs(root, leave_out=(), fail=()):
    """Runs of invented predictions; `leave_out` are ids without one, `fail` are runs (task, fold, seed)."""
    truth = {}
    for task in (JDFT, METAL):
        rng = np.random.default_rng(0)
        values = rng.normal(50, 20, N) if task == JDFT else np.arange(N) % 2.0
        ids, fold = [f"{task}-{i}" for i in range(N)], np.repeat(np.arange(FOLDS), N // FOLDS)
        truth[task] = pd.Series(values, index=ids)
        (root / "matbench").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"material_id": ids, "value": values, "fold": fold}),
            root / "matbench" / f"{task}.parquet",
        )
        for k in range(FOLDS):
            for seed in SETTINGS["seeds"]:
                folder = root / "runs" / fold_name(task, k) / "structure_only" / str(seed)
                failed = (task, k, seed) in fail
                record = {
                    "status": "failed" if failed else "finished",
                    "reason": "because" if failed else None,
                }
                record |= {"n": {"train": 16, "validation": 0, "test": 4}, "target_mean": 0.25, "commit": "c"}
                write_json(folder / "metrics.json", record)
                write_json(folder / "cost.json", {"seconds": 1.5})
                config = {"model": "structure_only", "seed": seed, "training": {"epochs": 3}}
                write_json(folder / "config.json", config)
                tested = [i for i in ids[4 * k : 4 * k + 4] if i not in leave_out]
                predicted = rng.uniform(0.01, 0.99, len(tested)) + (
                    values[: len(tested)] if task == JDFT else 0
                )
                frame = pd.DataFrame({"material_id": tested, "split": "test", "y_pred": predicted})
                frame.to_parquet(folder / "predictions.parquet")
    return truth


def read_results(root, seed=0):
    path = root / "matbench" / "structure_only" / str(seed) / "results.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def test_regression_scores_are_matbenchs():
    truth, predicted = np.array([1.0, -2.0, 0.0, 4.0]), np.array([1.5, -2.0, 1.0, 1.0])
    found = score(truth, predicted, "regression")
    assert found == {
        "mae": pytest.approx(1.125),
        "rmse": pytest.approx(np.sqrt((0.25 + 1 + 9) / 4)),
        "mape": pytest.approx((0.5 + 0 + 0.75) / 3),  # without the zero
        "max_error": 3.0,
    }
    assert score(np.zeros(2), np.ones(2), "regression")["mape"] == 0.0


def test_classification_scores_are_all_of_classes_cut_at_a_half():
    truth, probability = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.9, 0.6, 0.7])
    found = score(truth, probability, "classification")
    called = [0, 0, 1, 1, 1]
    assert found["accuracy"] == metrics.accuracy_score(truth, called) == 0.6
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["rocauc"] == pytest.approx(found["balanced_accuracy"])  # as matbench 0.6 has it


def test_results_are_in_the_form_that_the_package_verifies(tmp_path):
    """Its checks (0.6): keys, types, ids of each fold, and a hash of the sorted content."""
    write_runs(tmp_path)
    aggregate_matbench(SETTINGS, tmp_path)
    content = read_results(tmp_path)
    assert set(content) == {
        "@module", "@class", "version", "benchmark_name", "tasks", "user_metadata", "datestamp", "hash",
    }  # fmt: skip
    said = content.pop("hash")
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == said
    assert content["benchmark_name"] == "matbench_v0.1"
    scores = {
        JDFT: {"mae", "rmse", "mape", "max_error"},
        METAL: {"accuracy", "balanced_accuracy", "f1", "rocauc"},
    }
    assert set(content["tasks"]) == set(scores)
    for task, result in content["tasks"].items():
        assert set(result) == {"@module", "@class", "dataset_name", "benchmark_name", "results"}
        assert result["dataset_name"] == task and result["benchmark_name"] == content["benchmark_name"]
        assert list(result["results"]) == [f"fold_{k}" for k in range(FOLDS)]
        for k, fold in enumerate(result["results"].values()):
            assert set(fold) == {"data", "parameters", "scores"}
            assert set(fold["scores"]) == scores[task]
            assert all(isinstance(value, float) for value in fold["scores"].values())
            assert set(fold["data"]) == {f"{task}-{i}" for i in range(4 * k, 4 * k + 4)}
            assert all(isinstance(value, float) for value in fold["data"].values())
            assert task != METAL or all(0 <= value <= 1 for value in fold["data"].values())
            assert fold["parameters"] == {"model": "structure_only", "seed": 0, "training": {"epochs": 3}}


def test_the_table_has_mean_and_deviation_over_the_folds_beside_the_published(tmp_path):
    write_runs(tmp_path)
    aggregate_matbench(SETTINGS, tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "matbench.csv").set_index(["task", "model"])
    folds = [
        np.mean(
            [
                read_results(tmp_path, s)["tasks"][JDFT]["results"][f"fold_{k}"]["scores"]["mae"]
                for s in (0, 1)
            ]
        )
        for k in range(FOLDS)
    ]
    ours = table.loc[JDFT, "structure_only"]
    assert ours["mean"] == pytest.approx(np.mean(folds), rel=1e-5)
    assert ours["std"] == pytest.approx(np.std(folds), rel=1e-5)
    assert (ours["unit"], ours["metric"], ours["finished"], ours["filled"]) == ("meV/atom", "mae", 10, 0)
    published = table.loc[JDFT, "coGN"]
    assert (round(published["mean"], 4), round(published["std"], 4)) == (37.1652, 13.6825)
    assert round(table.loc[METAL, "coNGN"]["mean"], 4) == 0.9089
    assert table.loc[METAL, "coGN"]["metric"] == "rocauc"


def test_the_area_of_probabilities_stands_beside_the_packages(tmp_path):
    truth = write_runs(tmp_path)[METAL]
    aggregate_matbench(SETTINGS, tmp_path)
    folds = pd.read_csv(tmp_path / "tables" / "matbench_folds.csv")
    own = folds[(folds["task"] == METAL) & (folds["seed"] == 1)].set_index("fold")["rocauc_probabilities"]
    for k, fold in read_results(tmp_path, 1)["tasks"][METAL]["results"].items():
        said = pd.Series(fold["data"])
        assert own[int(k[-1])] == pytest.approx(metrics.roc_auc_score(truth[said.index], said))
    assert folds.loc[folds["task"] == JDFT, "rocauc_probabilities"].isna().all()


def test_another_structure_encoder_has_its_own_name(tmp_path):
    write_runs(tmp_path)
    settings = json.dumps(SETTINGS | {"structure_encoder": "alignn"})
    command = ["aggregate_matbench", "--settings", settings, "--results", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "castbench", *command], env=environment, check=True)
    table = pd.read_csv(tmp_path / "tables" / "matbench.csv")
    assert set(table.loc[table["model"] == "structure_only", "label"]) == {"ALIGNN"}
    said = read_results(tmp_path)["user_metadata"]
    assert (said["algorithm"], said["reference"]) == ("ALIGNN (castbench)", "Choudhary and DeCost 2021")


def test_a_crystal_without_a_prediction_gets_the_training_mean_and_is_counted(tmp_path, caplog):
    truth = write_runs(tmp_path, leave_out=(f"{JDFT}-5",))
    aggregate_matbench(SETTINGS, tmp_path)
    fold = read_results(tmp_path)["tasks"][JDFT]["results"]["fold_1"]
    assert fold["data"][f"{JDFT}-5"] == 0.25
    errors = [abs(value - truth[JDFT][name]) for name, value in fold["data"].items()]
    assert fold["scores"]["mae"] == pytest.approx(np.mean(errors))
    assert read_results(tmp_path)["user_metadata"]["filled"].startswith("1 crystals without a graph")
    table = pd.read_csv(tmp_path / "tables" / "matbench_folds.csv")
    assert table["filled"].sum() == 2  # of two seeds
    assert "1 test crystals without a graph get the mean" in caplog.text


def test_an_unfinished_fold_is_a_gap_and_its_task_not_submitted(tmp_path, caplog):
    write_runs(tmp_path, fail=((JDFT, 2, 1),))
    aggregate_matbench(SETTINGS, tmp_path)
    assert set(read_results(tmp_path, 0)["tasks"]) == {JDFT, METAL}
    assert set(read_results(tmp_path, 1)["tasks"]) == {METAL}
    table = pd.read_csv(tmp_path / "tables" / "matbench.csv").set_index(["task", "model"])
    row = table.loc[JDFT, "structure_only"]
    assert np.isnan(row["mean"]) and (row["finished"], row["expected"]) == (9, 10)
    assert np.isnan(row["fold_2"]) and row[["fold_0", "fold_1", "fold_3", "fold_4"]].notna().all()
    assert cell(row.to_dict()) == "– [9/10 runs]"
    assert "1 of 5 folds not finished; the task is not in results.json.gz" in caplog.text


def test_a_task_of_which_no_run_finished_is_a_gap_among_the_others(tmp_path):
    write_runs(tmp_path, fail=[(METAL, fold, seed) for fold in range(FOLDS) for seed in SETTINGS["seeds"]])
    aggregate_matbench(SETTINGS, tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "matbench.csv").set_index(["task", "model"])
    row = table.loc[METAL, "structure_only"]
    assert np.isnan(row["mean"]) and (row["finished"], row["expected"]) == (0, 10)
    assert np.isfinite(table.loc[JDFT, "structure_only"]["mean"])


def test_the_report_compares_published_files_alone():
    assert kind({"files": [{"task": JDFT, "published": True}]})["badge"] == "Matbench"
    own = kind({"files": [{"task": JDFT, "published": True}, {"task": METAL, "published": False}]})
    assert own["badge"] == "own data" and METAL in own["text"] and JDFT not in own["text"]


def test_the_best_error_is_the_least_and_the_best_area_the_largest():
    rows = [{"model": "a", "mean": 1.0}, {"model": "b", "mean": 2.0}, {"model": "c", "mean": float("nan")}]
    assert best([row | {"metric": "mae"} for row in rows]) == "a"
    assert best([row | {"metric": "rocauc"} for row in rows]) == "b"
    assert best([rows[2]]) is None
