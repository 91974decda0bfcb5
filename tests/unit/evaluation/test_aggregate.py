import json
import math
import shutil

import pandas as pd
import pytest

from castbench.evaluation.aggregate import RESOURCES, aggregate_runs, is_paper_setting
from castbench.provenance import write_json
from synthetic_results import SETTINGS, write_results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("aggregate"))


@pytest.fixture
def results(written, tmp_path):
    return shutil.copytree(written, tmp_path / "results")


def aggregate(results, settings=SETTINGS):
    aggregate_runs(settings, results, results / "tables")
    return results / "tables"


def test_table1_gives_mean_and_sample_std_over_seeds_with_units(results):
    table = pd.read_csv(aggregate(results) / "table1.csv").set_index("model")
    assert list(table.index) == [*SETTINGS["models"], "training_mean"]
    # seeds 0.40 and 0.41: mean 0.405, sample std 0.01 / sqrt(2)
    assert table.loc["cast", "Total energy MAE mean (eV/atom)"] == pytest.approx(0.405)
    assert table.loc["cast", "Total energy MAE std, ddof 1 (eV/atom)"] == pytest.approx(
        0.01 / math.sqrt(2), 1e-4
    )
    assert table.loc["cast", "Band gap n test"] == 18
    assert table.loc["cast", "Band gap rank"] == 1
    assert table.loc["cast_scratch", "Band gap rank"] == 2


def test_markdown_and_latex_mark_best_and_second_and_say_reference_only(results):
    tables = aggregate(results)
    markdown, latex = (tables / "table1.md").read_text(), (tables / "table1.tex").read_text()
    assert markdown.count("**0.405 (0.007)**") == 3
    assert markdown.count("<u>0.505 (0.007)</u>") == 3
    assert "Total energy (eV/atom)<br>n = 63 / 9 / 18" in markdown
    assert (
        "reference only" in markdown and "paper 0.256 (0.045)" in markdown and "difference +" not in markdown
    )
    assert "paper 0.039" not in markdown  # log_bulk_modulus was not run
    assert latex.count(r"\textbf{0.405 (0.007)}") == 3 and latex.count(r"\underline{") == 3
    assert "ddof = 1" in markdown and "ddof = 1" in latex


def test_table2_has_the_papers_counts_means_and_spreads_beside_ours(results):
    table = pd.read_csv(aggregate(results) / "table2.csv").set_index(["target", "split"])
    paper = pd.read_csv(RESOURCES / "paper" / "table2.csv").set_index(["target", "split"])
    totals = {"total_energy": 114_398, "band_gap": 65_367, "log_shear_modulus": 9_423}
    for target in SETTINGS["targets"]:
        for split in ("train", "val/test"):
            beside = table.loc[(target, split)].filter(like="paper_").rename(lambda name: name[6:])
            expected = paper.loc[(target, split)].drop("source")
            pd.testing.assert_series_equal(beside.astype(float), expected.astype(float), check_names=False)
        whole = table.loc[(target, "all")]
        assert whole["paper_n"] == totals[target]
        assert whole["paper_text_percent"] == pytest.approx(100 * whole["paper_text_count"] / totals[target])
        assert whole["n"] == table.loc[(target, "train"), "n"] + table.loc[(target, "val/test"), "n"]
        # It does not say how its val/test is divided, nor the mean of all.
        assert table.loc[[(target, "validation"), (target, "test")]].filter(like="paper_").isna().all(None)
        assert math.isnan(whole["paper_y_mean"])


def test_difference_to_the_paper_only_with_its_data_and_encoder(results):
    settings = SETTINGS | {"source": "materials_project", "text_encoder": "m3rg-iitd/matscibert@abc"}
    table = pd.read_csv(aggregate(results, settings) / "table1.csv").set_index("model")
    assert table.loc["cast", "Total energy MAE minus paper (eV/atom)"] == pytest.approx(0.405 - 0.256)
    assert "difference +0.149" in (results / "tables" / "table1.md").read_text()
    assert not is_paper_setting(settings | {"source": "local"})
    assert not is_paper_setting(settings | {"text_encoder": "minilm"})
    other = settings | {"structure_encoder": "alignn"}
    assert not is_paper_setting(other)
    text = (aggregate(results, other) / "table1.md").read_text()
    assert "encoders ALIGNN and m3rg" in text and "paper 0.673" not in text and "paper 0.256" in text
    assert pd.read_csv(aggregate(results) / "table1.csv").filter(like="minus paper").isna().all(axis=None)


@pytest.mark.parametrize("gap", ["missing", "failed", "skipped"])
def test_a_gap_is_counted_and_never_averaged(results, gap):
    run = results / "runs" / "band_gap" / "cast" / "1"
    if gap == "missing":
        shutil.rmtree(run)
    else:
        record = json.loads((run / "metrics.json").read_text())
        write_json(run / "metrics.json", record | {"status": gap, "reason": "loss is not finite"})
    tables = aggregate(results)
    table = pd.read_csv(tables / "table1.csv").set_index("model")
    assert table.loc["cast", "Band gap MAE mean (eV)"] == pytest.approx(0.40)
    assert math.isnan(table.loc["cast", "Band gap MAE std, ddof 1 (eV)"])
    assert (table.loc["cast", "Band gap runs finished"], table.loc["cast", "Band gap runs expected"]) == (
        1,
        2,
    )
    assert math.isnan(table.loc["cast", "Band gap rank"])
    assert table.loc["cast_scratch", "Band gap rank"] == 1
    assert "0.400 (–) [1/2 runs]" in (tables / "table1.md").read_text()
    runs = pd.read_csv(tables / "runs.csv").set_index(["target", "model", "seed"])
    row = runs.loc[("band_gap", "cast", 1)]
    assert row["status"] == gap and math.isnan(row["mae"])
    assert (runs["status"] == "finished").sum() == len(runs) - 1


def test_no_run_at_all_leaves_dashes(results):
    shutil.rmtree(results / "runs" / "band_gap" / "cast")
    markdown = (aggregate(results) / "table1.md").read_text()
    assert "| – [0/2 runs]<br>paper 0.354 (0.002) |" in markdown


def test_runs_of_models_that_are_not_configured_are_left_out(results):
    aggregate(results, SETTINGS | {"models": ["cast"]})
    assert set(pd.read_csv(results / "tables" / "runs.csv")["model"]) == {"cast"}


def test_runs_csv_has_scores_sizes_and_cost(results):
    runs = pd.read_csv(aggregate(results) / "runs.csv")
    assert len(runs) == 3 * 7 * 2
    row = runs.iloc[0]
    assert (row["target"], row["model"], row["seed"], row["unit"]) == (
        "total_energy",
        "structure_only",
        0,
        "eV/atom",
    )
    assert row["parameters_total"] == 700_000 and row["parameters_trainable"] == 600_000
    assert (row["seconds"], row["samples_per_second"], row["peak_memory_mb"]) == (12.5, 300.0, 900.0)
    assert {"mae", "rmse", "r2", "epochs"} <= set(runs.columns)
    lines = (results / "tables" / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(runs) and json.loads(lines[0])["cost"]["seconds"] == 12.5


def test_pretraining_and_comparisons(results):
    tables = aggregate(results)
    pretraining = pd.read_csv(tables / "pretraining.csv")
    assert len(pretraining) == 4
    masked = pretraining[pretraining["objective"] == "masked_node"]
    assert (masked["validation_accuracy_shuffled_text"] == 0.3).all()
    compared = pd.read_csv(tables / "comparisons.csv").set_index(["target", "model", "minus"])
    # every error of a run equals its MAE, so the interval has no width
    row = compared.loc[("band_gap", "cast", "cast_scratch")]
    assert row[["difference", "low", "high"]].to_numpy() == pytest.approx(-0.1)
    assert row["n"] == 18
    # text frozen in cast_scratch: only the frozen CrysMMNet is its like
    assert ("band_gap", "cast_scratch", "crysmmnet_frozen") in compared.index
    assert ("band_gap", "cast_scratch", "crysmmnet_lora") not in compared.index


def test_the_tables_are_the_same_bytes_again(results):
    first = {f.name: f.read_bytes() for f in aggregate(results).iterdir()}
    assert first == {f.name: f.read_bytes() for f in aggregate(results).iterdir()}
