"""Pieces of the composition report that can be wrong without looking wrong."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from castbench.compositions.targets import threshold_text
from castbench.deviations import deviations
from castbench.evaluation.classification import class_scores
from castbench.evaluation.compositions import (
    absolute_errors,
    calibration_table,
    class_row,
    class_table,
    difference,
    enrichment_table,
    number_table,
    pair,
    read_structure_run,
    report_row,
    run_table,
    score_run,
)
from castbench.provenance import write_json
from castbench.report.composition_figures import attention_by_token, focal_curve
from castbench.report.composition_html import mean_std, plot_points

SETTINGS = {
    "models": ["baseline", "edm_transformer"], "structure_models": [], "regression": ["band_gap"],
    "classification": {"stability": 0.0}, "seeds": [0, 1], "targets": [],
}  # fmt: skip


def record(shift: float) -> dict:
    truth = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0] * 2)
    predictions = pd.DataFrame(
        {
            "formula": list("abcdefghijkl"), "split": ["validation"] * 6 + ["test"] * 6,
            "band_gap_true": truth, "band_gap_pred": truth + shift,
            "stability_true": [0, 1] * 6, "stability_pred": [0.1, 0.4, 0.2, 0.3, 0.1, 0.4] * 2,
        }
    )  # fmt: skip
    scores = score_run(predictions, ["band_gap"], ["stability"])
    return {"status": "finished", "scores": scores, "predictions": predictions}


@pytest.fixture
def runs() -> dict:
    shifts = {("baseline", 0): 1.0, ("baseline", 1): 1.0, ("edm_transformer", 0): 0.2}
    missing = {("edm_transformer", 1): {"status": "missing", "reason": "no metrics.json"}}
    return {key: record(shift) for key, shift in shifts.items()} | missing


def test_a_runs_threshold_comes_from_validation_and_is_used_on_test():
    found = record(0.0)["scores"]["stability"]
    assert found["threshold"] == pytest.approx(0.25)
    assert found["test"]["at_threshold"]["accuracy"] == 1
    assert found["test"]["at_half"]["recall"]["positive"] == 0


def test_the_gap_table_has_every_run_and_the_reports_row(runs: dict):
    table = number_table(runs, SETTINGS).set_index("model")
    assert table.loc["edm_transformer", ["finished", "expected"]].tolist() == [1, 2]
    assert table.loc["edm_transformer", "mae_mean"] == pytest.approx(0.2)
    assert table.loc["baseline", "mae_std"] == 0
    assert table.loc["baseline", "minus_edm"] == pytest.approx(0.8)
    assert table.loc["edm_report", "mae_mean"] == 0.4267
    assert difference(runs, SETTINGS, "edm_transformer", "band_gap")["minus_edm"] is None


def test_a_difference_is_of_common_seeds_and_at_least_five_formulas(runs: dict):
    runs["baseline", 1] = record(5.0)  # a seed that the EDM Transformer did not finish
    found = difference(runs, SETTINGS, "baseline", "band_gap")
    assert found["minus_edm"] == pytest.approx(0.8) and found["n_common"] == 6
    kept = runs["baseline", 0]["predictions"]
    runs["baseline", 0]["predictions"] = kept[~kept["formula"].isin(["k", "l"])]
    found = difference(runs, SETTINGS, "baseline", "band_gap")
    assert np.isnan(found["minus_edm"]) and np.isnan(found["low"]) and found["n_common"] == 4


@pytest.mark.parametrize("failed", ["band_gap", "energy_above_hull"])
def test_a_structure_model_of_which_a_run_failed_is_not_finished(tmp_path: Path, failed: str):
    ids, splits = [f"m-{i}" for i in range(8)], ["validation"] * 4 + ["test"] * 4
    known = pd.DataFrame({"material_id": ids, "formula": list("abcdefgh")})
    known.to_parquet(tmp_path / "compositions.parquet")
    for target in ("band_gap", "energy_above_hull"):
        folder = tmp_path / "runs" / target / "cast" / "0"
        record = {"status": "finished", "reason": None, "n": {}, "parameters": {}}
        if target == failed:
            record |= {"status": "failed", "reason": "training loss is not finite at step 3"}
        write_json(folder / "metrics.json", record)
        values = np.array([0.0, 1.0] * 4)
        table = {"material_id": ids, "split": splits, "y_true": values, "y_pred": values + 0.1}
        pd.DataFrame(table).to_parquet(folder / "predictions.parquet")
    settings = SETTINGS | {"targets": ["band_gap", "energy_above_hull"]}
    found = read_structure_run(settings, tmp_path, "cast", 0)
    assert found["status"] == "failed"
    assert found["reason"] == f"{failed}: training loss is not finite at step 3"
    assert set(found["scores"]) == {"stability" if failed == "band_gap" else "band_gap"}


def test_a_class_row_has_every_average():
    row = class_row(class_scores(np.array([0, 1, 1]), np.array([0, 1, 0])))
    assert row["recall_positive"] == 0.5
    assert len(row) == 2 + 3 * 4


def test_enrichment_rows_are_by_pool_and_seed():
    own = {"enrichment": [{"share": 0.01, "n": 1, "hits": 1}], "roc_auc_pool": 0.9, "roc_auc_hidden": 0.8}
    pool = {"n": 100, "n_hidden": 3, "mean": own, "0": own}
    table = enrichment_table({"n_hidden_stable": 4, "pools": {"in_window": pool, "allowed": pool}}, [0])
    assert table["pool"].tolist() == ["in_window", "in_window", "allowed", "allowed"]
    assert table["seed"].isna().tolist() == [True, False, True, False]


def test_the_two_averages_of_attention_differ():
    weights = np.zeros((4, 3, 3))
    weights[:, 0] = [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.45, 0.45], [0.1, 0.1, 0.8]]
    mean, count = attention_by_token(weights)
    assert mean == pytest.approx([0.275, 0.3, 0.425])
    assert count.tolist() == [2, 1, 1]


def test_the_focal_curve_is_the_loss():
    p = np.array([0.5, 1.0])
    assert focal_curve(p, 1, 0) == pytest.approx([np.log(2), 0])
    assert focal_curve(p, 0.25, 2) == pytest.approx([0.25 * 0.25 * np.log(2), 0])


def test_thresholds_are_said_with_their_unit():
    assert threshold_text("stability", 0.0) == "stable: energy above hull ≤ 0 eV/atom"
    assert threshold_text("metallicity", 0.1) == "metal: band gap ≤ 0.1 eV"


def test_numbers_without_spread_have_no_brackets():
    assert mean_std({"mae_mean": 0.4267, "mae_std": float("nan")}, "mae") == "0.427"
    assert mean_std({"mae_mean": 0.4, "mae_std": 0.01}, "mae") == "0.400 (0.010)"
    assert mean_std({"mae_mean": float("nan")}, "mae") == "–"


def test_points_are_json_without_nan_or_tags(tmp_path: Path):
    table = pd.DataFrame(
        {
            "formula": ["CaTiO3", "</script>", "KSnCl3"], "rank": [2, 1, 3], "in_window": [True, True, False],
            "band_gap_mean": [1.0, 2.0, 3.0], "band_gap_std": [0.1, float("nan"), 0.1],
            "stability_mean": [0.9, 0.95, 0.1], "stability_std": [0.1] * 3, "goldschmidt": [1.0] * 3,
            "bartel": [3.9, 4.0, 5.0], "known": ["test", None, None], "known_stable": [True, None, None],
        }
    )  # fmt: skip
    table.to_parquet(tmp_path / "candidates.parquet")
    text = plot_points(tmp_path / "candidates.parquet")
    assert "<" not in text
    found = json.loads(text)
    assert found["formula"] == ["</script>", "CaTiO3"]
    assert found["gapStd"] == [None, 0.1]
    assert found["stable"] == [None, True]


def test_each_study_shows_its_own_deviations(root: Path):
    entries = yaml.safe_load((root / "workflow/resources/deviations.yaml").read_text())
    cast, compositions, matbench = map(deviations, ("cast", "compositions", "matbench"))
    assert all(entry in (*cast, *compositions, *matbench) for entry in entries)
    own, shared = [[entry for entry in matbench if (entry in cast) == both] for both in (False, True)]
    assert own and all(entry["id"].startswith("matbench_") for entry in own)
    assert {"element_features", "graphs", "structure_encoders"} <= {entry["id"] for entry in shared}
    assert all(entry["id"].startswith("edm_") for entry in compositions)
    assert not any(entry["id"].startswith("edm_") for entry in cast)


def test_a_structure_model_ranks_by_the_energy_above_hull_that_it_predicts(tmp_path: Path):
    ids, splits = [f"m-{i}" for i in range(8)], ["validation"] * 4 + ["test"] * 4
    known = pd.DataFrame({"material_id": ids, "formula": list("abcdefgh")})
    known.to_parquet(tmp_path / "compositions.parquet")
    truth = {"band_gap": np.arange(8.0), "energy_above_hull": np.array([0.0, 0.1, 0.02, 0.3] * 2)}
    for target, values in truth.items():
        folder = tmp_path / "runs" / target / "cast" / "0"
        write_json(folder / "metrics.json", {"status": "finished", "n": {"test": 4}, "parameters": {}})
        write_json(folder / "cost.json", {"seconds": 2.0 if target == "band_gap" else 3.0})
        table = {"material_id": ids, "split": splits, "y_true": values, "y_pred": values + 0.5}
        pd.DataFrame(table).to_parquet(folder / "predictions.parquet")
    settings = SETTINGS | {"classification": {"stability": 0.02}, "targets": list(truth)}
    found = read_structure_run(settings, tmp_path, "cast", 0)
    assert found["scores"]["band_gap"]["test"]["mae"] == pytest.approx(0.5)
    own = found["scores"]["stability"]
    assert own["threshold"] == pytest.approx(-0.56)  # half-way between 0.52 and 0.6
    assert own["test"]["roc_auc"] == 1 and own["test"]["at_threshold"]["confusion"] == [[2, 0], [0, 2]]
    assert found["cost"]["seconds"] == 5.0
    settings |= {"models": [], "structure_models": ["cast"], "seeds": [0]}
    table = class_table({("cast", 0): found}, settings).set_index("model")
    assert table.loc["cast", "cut"] == "at_threshold" and table.loc["cast", "n_test"] == 4
    assert np.isnan(table.loc["cast", "probability_mean"])  # its threshold is an energy


def test_the_table_of_classes_has_both_cuts_and_the_reports_row(runs: dict):
    table = class_table(runs, SETTINGS).set_index(["model", "cut"])
    half, chosen = (table.loc[("baseline", cut)] for cut in ("at_half", "at_threshold"))
    assert (half["accuracy_mean"], chosen["accuracy_mean"], chosen["accuracy_std"]) == (0.5, 1, 0)
    assert half["probability_mean"] == 0.5 and chosen["probability_mean"] == pytest.approx(0.25)
    assert (half["finished"], half["expected"], half["n_test"]) == (2, 2, 6)
    test = runs["baseline", 0]["scores"]["stability"]["test"]
    assert chosen["ece_mean"] == pytest.approx(test["calibration"]["ece"])
    assert chosen["roc_auc_mean"] == test["roc_auc"] == 1
    assert table.loc[("edm_report", "at_half"), "accuracy_mean"] == report_row()["accuracy_mean"]


def test_spread_over_seeds_is_the_samples(runs: dict):
    runs["baseline", 1] = record(2.0)
    table = number_table(runs, SETTINGS).set_index("model")
    assert table.loc["baseline", "mae_mean"] == 1.5
    assert table.loc["baseline", "mae_std"] == pytest.approx(np.std([1, 2], ddof=1))


def test_the_table_of_runs_has_scores_at_the_chosen_threshold(runs: dict):
    table = run_table(runs, SETTINGS).set_index(["model", "seed"])
    row = table.loc[("baseline", 0)]
    assert row["band_gap_mae"] == pytest.approx(1) and row["stability_threshold"] == pytest.approx(0.25)
    assert (row["stability_accuracy"], row["stability_f1_macro"]) == (1, 1)
    assert table.loc[("edm_transformer", 1), "status"] == "missing"


def test_calibration_is_that_of_the_test_part(runs: dict):
    predictions = runs["baseline", 0]["predictions"]
    predictions.loc[predictions["split"] == "test", "stability_pred"] += 0.5
    runs["baseline", 0]["scores"] = score_run(predictions, ["band_gap"], ["stability"])
    table = calibration_table(runs, SETTINGS).set_index(["model", "seed", "bin"])
    assert table.loc[("baseline", 0), "n"].tolist() == [0, 0, 0, 0, 0, 0, 2, 1, 1, 2]
    assert table.loc[("baseline", 1), "n"].tolist() == [0, 2, 1, 1, 2, 0, 0, 0, 0, 0]


def test_errors_are_of_test_formulas_whose_value_is_known():
    frame = record(1.0)["predictions"]
    frame.loc[11, "band_gap_true"] = np.nan
    errors = absolute_errors([{"predictions": frame}], "band_gap")
    assert errors.index.tolist() == list("ghijk")
    assert len(pair(frame, "band_gap", "test")[0]) == 5
