"""Screening: what is predicted, ranked and known, and enrichment by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Composition

from castbench.compositions import screen
from castbench.compositions.screen import (
    curve,
    enrichment,
    formula_key,
    screen_compositions,
    validate_pool,
    validate_screening,
)
from castbench.errors import InputError
from castbench.evaluation.composition_attention import explain_compositions
from castbench.evaluation.compositions import enrichment_table
from castbench.materials.splits import load_split
from castbench.provenance import write_json
from castbench.training.compositions import train_compositions

SEEDS = [0, 1]
ARCHITECTURE = {"edm_transformer": {"width": 24, "layers": 1, "heads": 2, "feedforward": 24, "dropout": 0.0}}
SCREENING: dict[str, Any] = {
    "a": ["Cs", "Rb", "K", "Ba", "Sr"], "b": ["Sn", "Ca", "Ti", "Zr"], "x": ["O", "Cl", "Br"],
    "oxidation_states": "icsd24", "goldschmidt": [0.825, 1.059], "bartel": 4.18, "top": 5,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "dataset": "invented", "model": "edm_transformer", "max_elements": 4, "regression": ["band_gap"],
    "classification": {"stability": 0.0}, "loss": "inverse_frequency", "architecture": ARCHITECTURE,
    "screening": SCREENING,
    "training": {
        "epochs": 2, "patience": None, "batch_size": 8, "learning_rate": 1e-3, "encoder_learning_rate": 1e-4,
        "weight_decay": 1e-2, "warmup_steps": 10, "cycles": 1, "task_weights": "learned",
        "precision": "32-true", "device": "cpu", "threads": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_compositions(
        SETTINGS, "edm_transformer", SEEDS, data / "compositions.parquet", data / "split.json", folder, 1
    )
    return folder


def screened(data: Path, runs: Path, folder: Path, seeds: list[int] = SEEDS, **screening: Any) -> Path:
    screen_compositions(
        SETTINGS | {"screening": SCREENING | screening}, seeds, runs, data / "compositions.parquet",
        data / "split.json", folder / "candidates.parquet", folder / "ranked.csv", folder / "summary.json", 1,
    )  # fmt: skip
    return folder


def test_candidates_are_predicted_ranked_and_marked(data: Path, runs: Path, tmp_path: Path):
    folder = screened(data, runs, tmp_path)
    table = pd.read_parquet(folder / "candidates.parquet").sort_values("rank")
    summary = json.loads((folder / "summary.json").read_text())
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    assert table["formula"].is_unique
    assert summary["steps"][0] == {"step": "enumerated", "left": 5 * 4 * 3}
    assert (summary["predicted"], summary["in_window"]) == (len(table), table["in_window"].sum())
    inside = table[table["in_window"]]
    assert 0 < len(inside) < len(table)
    assert inside["rank"].max() == len(inside)  # what is outside the windows comes behind
    assert inside["stability_mean"].is_monotonic_decreasing
    assert inside["goldschmidt"].between(0.825, 1.059).all()
    assert (inside["bartel"] <= 4.18).all()
    by_seed = table[[f"stability_seed_{seed}" for seed in SEEDS]].to_numpy(dtype=float)
    assert table["stability_mean"].to_numpy() == pytest.approx(by_seed.mean(axis=1), abs=1e-6)
    assert table["stability_std"].to_numpy() == pytest.approx(by_seed.std(axis=1, ddof=1), abs=1e-6)
    lists, known = load_split(data / "split.json"), table.dropna(subset="known")
    assert len(known) > 5
    for row in known.itertuples():
        assert row.formula in lists[row.known]
    unknown = set(table["formula"]) - set(known["formula"])
    assert not unknown & {formula for part in ("train", "validation", "test") for formula in lists[part]}
    ranked = pd.read_csv(folder / "ranked.csv")
    assert ranked["formula"].tolist() == inside["formula"].tolist()[:5]
    assert not list(folder.glob("*.unranked"))


def test_predictions_are_those_of_the_model(data: Path, runs: Path, tmp_path: Path):
    """A known formula of the test part gets the same prediction here as in its run."""
    table = pd.read_parquet(screened(data, runs, tmp_path) / "candidates.parquet").set_index("formula")
    own = pd.read_parquet(runs / "1" / "predictions.parquet").set_index("formula")
    common = own.index.intersection(table.index)
    assert len(common) > 1
    assert table.loc[common, "stability_seed_1"].to_numpy() == pytest.approx(
        own.loc[common, "stability_pred"].to_numpy(), abs=1e-5
    )


def test_small_chunks_give_the_same(data: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = pd.read_parquet(screened(data, runs, tmp_path / "a") / "candidates.parquet")
    monkeypatch.setattr(screen, "CHUNK", 2)
    parts = screened(data, runs, tmp_path / "b") / "candidates.parquet"
    assert pq.ParquetFile(parts).num_row_groups > 5
    pd.testing.assert_frame_equal(whole, pd.read_parquet(parts), atol=1e-5)


def test_one_seed_has_no_spread(data: Path, runs: Path, tmp_path: Path):
    table = pd.read_parquet(screened(data, runs, tmp_path, seeds=[0]) / "candidates.parquet")
    assert table["stability_std"].isna().all()


def test_nothing_left_and_missing_runs_are_one_line(data: Path, runs: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no candidate is left"):
        screened(data, runs, tmp_path, x=["Cs"], a=["Rb"], b=["K"])
    with pytest.raises(InputError, match="no run is finished, of seeds 7"):
        screened(data, runs, tmp_path, seeds=[7])
    with pytest.raises(InputError, match="Xx"):
        screened(data, runs, tmp_path, a=["Xx"])


def test_a_seed_that_failed_is_left_out_and_the_others_go_on(data: Path, runs: Path, tmp_path: Path, caplog):
    """Its record and empty files are there, as training leaves them."""
    some = shutil.copytree(runs, tmp_path / "runs")
    write_json(some / "2" / "metrics.json", {"status": "failed", "reason": "training loss is not finite"})
    seeds = [2, *SEEDS]
    folder = screened(data, some, tmp_path, seeds=seeds)
    assert "2: failed, training loss is not finite; left out" in caplog.text
    assert json.loads((folder / "summary.json").read_text())["seeds"] == SEEDS
    (tmp_path / "both").mkdir()
    both = screened(data, runs, tmp_path / "both")
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "candidates.parquet"), pd.read_parquet(both / "candidates.parquet")
    )
    settings = {"seeds": seeds, "classification": {"stability": 0.0}}
    inputs = (folder / "candidates.parquet", data / "compositions.parquet", data / "split.json")
    validate_screening(settings, *inputs, tmp_path / "validation.json")
    table = enrichment_table(json.loads((tmp_path / "validation.json").read_text()), seeds)
    assert set(table["seed"].dropna()) == {0, 1} and table["seed"].isna().any()
    explain_compositions(
        SETTINGS | {"edm": "Al2O3", "attention": "CaTiO3"}, seeds, some, tmp_path / "own.json"
    )
    assert list(json.loads((tmp_path / "own.json").read_text())["attention"]["seeds"]) == ["0", "1"]


def test_hidden_compounds_are_looked_for_among_what_is_unknown(data: Path, runs: Path, tmp_path: Path):
    folder = screened(data, runs, tmp_path)
    validate_screening(
        {"seeds": SEEDS, "classification": {"stability": 0.0}}, folder / "candidates.parquet",
        data / "compositions.parquet", data / "split.json", folder / "validation.json",
    )  # fmt: skip
    found = json.loads((folder / "validation.json").read_text())
    table = pd.read_parquet(folder / "candidates.parquet")
    lists = load_split(data / "split.json")
    stable = pd.read_parquet(data / "compositions.parquet").query("energy_above_hull <= 0")["formula"]
    assert found["n_hidden_stable"] == len(set(lists["test"]) & set(stable))
    pool = table[~table["formula"].isin(lists["train"] + lists["validation"])]
    assert found["hidden_share"] == len(lists["test"]) / 36
    assert found["pools"]["allowed"]["n"] == len(pool)
    hidden = pool["formula"].isin(set(lists["test"]) & set(stable))
    assert found["pools"]["allowed"]["n_hidden"] == hidden.sum()
    assert set(found["pools"]["in_window"]) >= {"mean", "0", "1"}


def test_enrichment_by_hand():
    hits = np.zeros(200, dtype=bool)
    hits[[0, 1, 5, 150]] = True
    first, second, third = enrichment(hits)
    assert (first["n"], first["hits"], first["expected"], first["factor"]) == (2, 2, 0.04, 50)
    assert (second["n"], second["hits"], second["factor"]) == (10, 3, 15)
    assert (third["n"], third["hits"]) == (20, 3)
    assert first["p"] == pytest.approx(4 / 200 * 3 / 199)
    assert [row["factor"] for row in enrichment(np.zeros(50, dtype=bool))] == [None] * 3
    found = curve(hits)
    assert (found["looked_at"][0], found["found"][0]) == (0, 0)
    assert (found["looked_at"][-1], found["found"][-1]) == (1, 1)
    assert curve(np.zeros(3, dtype=bool)) == {"looked_at": [], "found": []}


def test_a_key_knows_no_order_of_a_and_b():
    assert formula_key(Composition("CaTiO3")) == formula_key(Composition("TiCaO3")) == (20, 22, 8)
    assert formula_key(Composition("Ca3SnO")) == (8, 50, 20)


def test_matrix_and_attention_of_formulas(runs: Path, tmp_path: Path):
    settings = SETTINGS | {"edm": "Al2O3", "attention": "CaTiO3"}
    explain_compositions(settings, SEEDS, runs, tmp_path / "own.json")
    found = json.loads((tmp_path / "own.json").read_text())
    assert found["edm"]["slots"] == ["Al", "O", "[PAD]", "[PAD]"]
    assert np.array(found["edm"]["matrix"]).shape == (4, 466)
    assert found["attention"]["tokens"] == ["[CLS]", "Ca", "Ti", "O", "[PAD]"]
    weights = np.array(found["attention"]["seeds"]["1"])
    assert weights.shape == (1, 2, 5, 5)
    assert weights[..., :4, :].sum(axis=-1) == pytest.approx(1, abs=1e-4)
    assert not weights[..., 4].any()
    with pytest.raises(InputError, match=r"compositions.explain.*more elements than slots"):
        explain_compositions(settings | {"edm": "LiNaKRbCsO3"}, SEEDS, runs, tmp_path / "own.json")


def test_a_pool_is_ranked_by_the_mean_and_by_every_seed():
    pool = pd.DataFrame(
        {
            "known": ["test", "test", None, None, "test"], "known_stable": [True, False, None, None, True],
            "stability_mean": [0.9, 0.1, 0.5, 0.2, 0.3], "stability_seed_1": [0.1, 0.9, 0.5, 0.6, 0.3],
        }
    )  # fmt: skip
    found = validate_pool(pool, [1])
    assert (found["n"], found["n_hidden"], found["n_hidden_unstable"]) == (5, 2, 1)
    assert found["mean"]["roc_auc_pool"] == pytest.approx(5 / 6)
    assert (found["mean"]["roc_auc_hidden"], found["1"]["roc_auc_hidden"]) == (1, 0)
    assert [found[name]["enrichment"][0]["hits"] for name in ("mean", "1")] == [1, 0]
    assert found["mean"]["curve"]["found"] == [0, 0.5, 0.5, 1, 1, 1]
