import json
import math
import shutil

import pandas as pd
import pytest
import yaml

from castbench import config, labels
from castbench.evaluation.aggregate import COMPARISONS, aggregate_runs, compared_pairs, is_paper_setting
from castbench.evaluation.records import RESOURCES, WORKFLOW, read_errors, read_json, write_csv
from castbench.provenance import write_json
from castbench.report.html import comparison_rows
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


def test_a_model_that_the_paper_lacks_is_compared(results, monkeypatch):
    monkeypatch.setitem(config.MODELS, "gated", ("none", ("structure",), None))
    monkeypatch.setitem(labels.MODELS, "gated", labels.MODELS["cast"])
    assert compared_pairs([*SETTINGS["models"], "text_only"]) == list(COMPARISONS)
    assert compared_pairs(["gated"])[-2:] == [("gated", "structure_only"), ("gated", "cast")]
    for target in SETTINGS["targets"]:
        shutil.copytree(results / "runs" / target / "cast_scratch", results / "runs" / target / "gated")
        for seed in SETTINGS["seeds"]:
            record = results / "runs" / target / "gated" / str(seed) / "metrics.json"
            write_json(record, json.loads(record.read_text()) | {"model": "gated"})
    settings = SETTINGS | {"models": [*SETTINGS["models"], "gated"]}
    table = pd.read_csv(aggregate(results, settings) / "comparisons.csv")
    found = table[(table["model"] == "gated") & (table["minus"] == "cast")]
    assert list(found["difference"]) == pytest.approx([0.1] * 3, abs=1e-6)


def test_markdown_and_latex_mark_best_and_second_and_say_reference_only(results):
    tables = aggregate(results)
    markdown, latex = (tables / "table1.md").read_text(), (tables / "table1.tex").read_text()
    assert markdown.count("**0.405 (0.007)**") == 3
    assert markdown.count("<ins>0.505 (0.007)</ins>") == 3
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
    preset = yaml.safe_load((WORKFLOW / "presets" / "paper.yaml").read_text())
    paper = {key: preset["materials"][key] for key in ("source", "sample", "filters", "split")}
    settings = SETTINGS | paper | {"text_encoder": "m3rg-iitd/matscibert@abc"}
    assert is_paper_setting(settings | {"split": settings["split"] | {"seed": 1}})
    for key, value in (("max_energy_above_hull", None), ("abx3", True), ("ordered_moduli", False)):
        assert not is_paper_setting(settings | {"filters": settings["filters"] | {key: value}})
    assert is_paper_setting(settings | {"filters": settings["filters"] | {"ordered_moduli": "strict"}})
    assert not is_paper_setting(settings | {"split": settings["split"] | {"group_by": "formula"}})
    assert not is_paper_setting(settings | {"sample": 1000})
    assert not is_paper_setting(settings | {"max_tokens": 128})
    table = pd.read_csv(aggregate(results, settings) / "table1.csv").set_index("model")
    assert table.loc["cast", "Total energy MAE minus paper (eV/atom)"] == pytest.approx(0.405 - 0.256)
    assert table.loc["cast", "Total energy paper MAE mean (eV/atom)"] == 0.256
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
    assert " & -- [0/2 runs] & " in (results / "tables" / "table1.tex").read_text()


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
    assert row["n"] == 18 and row["seeds"] == 2
    # text frozen in cast_scratch: only the frozen CrysMMNet is its like
    assert ("band_gap", "cast_scratch", "crysmmnet_frozen") in compared.index
    assert ("band_gap", "cast_scratch", "crysmmnet_lora") not in compared.index
    for other in ("crysmmnet_frozen", "multimat"):
        assert ("band_gap", "cast", other) in compared.index
    assert ("band_gap", "cast", "crysmmnet_lora") not in compared.index


def test_models_are_compared_on_the_seeds_that_both_finished(results):
    run = results / "runs" / "band_gap" / "cast" / "1"
    write_json(run / "metrics.json", {"status": "failed", "reason": "loss is not finite", "text": "frozen"})
    tables = aggregate(results)
    compared = pd.read_csv(tables / "comparisons.csv").set_index(["target", "model", "minus"])
    row = compared.loc[("band_gap", "cast", "cast_scratch")]
    assert row["seeds"] == 1  # seed 1, whose errors are larger by 0.01, would make it -0.105
    assert row[["difference", "low", "high"]].to_numpy() == pytest.approx(-0.1)
    gain = pd.read_csv(tables / "text_gain.csv").set_index("target")
    assert (gain.loc["band_gap", "seeds"] == 1).all() and (gain.loc["total_energy", "seeds"] == 2).all()
    shown = comparison_rows(tables / "comparisons.csv", ["band_gap", "total_energy"], 2)[0][1]
    assert [cell["short"] for cell in shown] == ["1 of 2 seeds", ""]
    assert [cell["verdict"] for cell in shown] == ["", "near"]
    shutil.rmtree(results / "runs" / "band_gap" / "cast")
    compared = pd.read_csv(aggregate(results) / "comparisons.csv")
    assert "cast" not in set(compared.loc[compared["target"] == "band_gap", "model"])


def test_models_are_not_compared_on_fewer_than_five_crystals(results):
    for file in (results / "runs" / "band_gap").glob("*/*/predictions.parquet"):
        frame = pd.read_parquet(file)
        pd.concat([frame[frame["split"] != "test"], frame[frame["split"] == "test"][:4]]).to_parquet(file)
    compared = pd.read_csv(aggregate(results) / "comparisons.csv").set_index("target")
    assert (compared.loc["band_gap", "n"] == 4).all()
    assert compared.loc["band_gap", ["difference", "low", "high"]].isna().all(axis=None)
    assert compared.loc["total_energy", "low"].notna().all()


def test_the_tables_are_the_same_bytes_again(results):
    first = {f.name: f.read_bytes() for f in aggregate(results).iterdir()}
    assert first == {f.name: f.read_bytes() for f in aggregate(results).iterdir()}


def test_every_score_stands_in_its_own_column(results):
    file = results / "runs" / "band_gap" / "cast" / "0" / "metrics.json"
    scores = {"test": {"mae": 1.5, "rmse": 2.5, "r2": 0.25}, "validation": {"mae": 3.5, "rmse": 9, "r2": 0}}
    started = {"pretrained": {"objective": "masked_node", "seed": 7}}
    write_json(file, json.loads(file.read_text()) | scores | started)
    runs = pd.read_csv(aggregate(results) / "runs.csv").set_index(["target", "model", "seed"])
    row = runs.loc[("band_gap", "cast", 0)]
    assert row[["mae", "rmse", "r2", "validation_mae"]].tolist() == [1.5, 2.5, 0.25, 3.5]
    assert row["pretrained"] == "masked_node/7"


def test_tables_have_six_digits(tmp_path):
    frame = pd.DataFrame({"error": [0.123456789, 1.0], "n": [3.0, math.nan]})
    write_csv(tmp_path / "a.csv", frame)
    assert (tmp_path / "a.csv").read_text() == "error,n\n0.123457,3\n1,\n"


def test_errors_are_those_of_test_crystals_alone(results):
    errors = read_errors(results, "band_gap", "cast", [0, 1])
    assert list(errors.index) == read_json(results / "splits" / "band_gap.json")["test"]
    assert errors.to_numpy() == pytest.approx(0.405)


def test_the_gain_of_the_text_is_that_of_each_group(results):
    """The error of CAST grows with the number of the crystal, that of coGN is 1."""
    for model in ("cast", "structure_only"):
        for file in (results / "runs" / "total_energy" / model).glob("*/predictions.parquet"):
            frame = pd.read_parquet(file)
            place = frame["material_id"].str.removeprefix("m-").astype(int)
            error = place / 100 if model == "cast" else 1.0
            frame.assign(y_pred=frame["y_true"] + error).to_parquet(file)
    index = pd.read_parquet(results / "tokens" / "index.parquet")
    index.loc[[8, 9, 18, 19, 28], "has_text"] = False
    index.to_parquet(results / "tokens" / "index.parquet")
    gain = pd.read_csv(aggregate(results) / "text_gain.csv")
    gain = gain[gain["target"] == "total_energy"].set_index(["by", "group"])
    tested = [i for i in range(90) if i % 10 >= 8]
    groups = {
        ("all", "all"): tested,
        ("crystal system", "triclinic"): [i for i in tested if i % 10 == 8],
        ("crystal system", "trigonal"): [i for i in tested if i % 10 == 9],
        ("sites", "5–8"): [i for i in tested if 5 <= 1 + i % 12 <= 8],
        ("sites", "9–16"): [i for i in tested if 1 + i % 12 >= 9],
        ("text", "none"): [8, 9, 18, 19, 28],
        ("text", "read to its end"): [i for i in tested if i > 28 and 100 + 8 * i <= 512],
        ("text", "truncated"): [i for i in tested if 100 + 8 * i > 512],
    }
    for group, members in groups.items():
        assert gain.loc[group, "n"] == len(members) >= 5, group
        mean = sum(members) / len(members) / 100 - 1
        assert gain.loc[group, "difference"] == pytest.approx(mean, abs=1e-5), group
