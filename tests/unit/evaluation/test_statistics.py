import numpy as np
import pandas as pd
import pytest

from castbench.evaluation.statistics import (
    crystal_systems,
    dataset_statistics,
    mean_baseline,
    mean_interval,
    read_crystals,
    read_split,
    read_values,
)
from castbench.materials.splits import write_split
from synthetic_results import SETTINGS, write_results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("statistics"))


def test_crystal_systems_at_every_border():
    borders = {1: "triclinic", 2: "triclinic", 3: "monoclinic", 15: "monoclinic", 16: "orthorhombic",
               74: "orthorhombic", 75: "tetragonal", 142: "tetragonal", 143: "trigonal", 167: "trigonal",
               168: "hexagonal", 194: "hexagonal", 195: "cubic", 230: "cubic"}  # fmt: skip
    assert list(crystal_systems(np.array(list(borders)))) == list(borders.values())


def test_dataset_statistics_by_hand(results):
    table = dataset_statistics(results, SETTINGS["targets"]).set_index(["target", "split"])
    splits = ["train", "validation", "test", "val/test", "all"]
    assert list(table.loc["total_energy"].index) == splits
    assert list(table.loc["total_energy", "n"]) == [63, 9, 18, 27, 90]
    row = table.loc[("total_energy", "train")]
    index = np.array([i for i in range(90) if i % 10 < 7])
    assert row["nodes_mean"] == pytest.approx((1 + index % 4).mean())
    assert row["nodes_std"] == pytest.approx((1 + index % 4).std(ddof=1))
    lengths = np.where(index == 3, 1, 100 + 8 * index)  # before truncation; 3 has no text
    assert row["tokens_mean"] == pytest.approx(lengths.mean())
    assert row["text_count"] == 62 and row["text_percent"] == pytest.approx(100 * 62 / 63)
    held_out = table.loc[("total_energy", "val/test")]
    index = np.array([i for i in range(90) if i % 10 >= 7])
    energies = read_values(results, "total_energy")[[f"m-{i}" for i in index]]
    assert held_out["nodes_mean"] == pytest.approx((1 + index % 4).mean())
    assert held_out["y_mean"] == pytest.approx(energies.mean())
    assert held_out["y_std"] == pytest.approx(energies.std(ddof=1)) and held_out["unit"] == "eV/atom"
    assert table.loc[("total_energy", "all"), "text_count"] == 89


def test_values_are_in_the_unit_of_the_target(results):
    assert read_values(results, "log_shear_modulus")["m-1"] == pytest.approx(np.log10(11))


def test_the_baseline_predicts_the_training_mean(results):
    split, values = read_split(results, "band_gap"), read_values(results, "band_gap")
    expected = np.mean([abs(values[i] - values[split["train"]].mean()) for i in split["test"]])
    assert mean_baseline(results, "band_gap") == pytest.approx(expected)


def test_a_target_with_too_few_crystals_has_no_statistics(tmp_path):
    results = write_results(tmp_path, SETTINGS | {"targets": ["band_gap"], "models": ["cast"]})
    write_split(results / "splits" / "band_gap.json", {"target": "band_gap"}, {}, "too few")
    assert np.isnan(mean_baseline(results, "band_gap"))
    table = dataset_statistics(results, ["band_gap"])
    assert list(table["n"]) == [0] * 5 and table["y_mean"].isna().all()


def test_interval_of_a_mean_covers_a_known_shift():
    mean, low, high = mean_interval(0.1 + np.random.default_rng(0).normal(0, 0.2, 400))
    assert low < 0.1 < high and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.2)


def test_fewer_than_five_crystals_give_no_mean_since_they_give_no_interval():
    for n in range(5):
        assert np.isnan(mean_interval(np.arange(float(n)))).all()
    assert np.isfinite(mean_interval(np.arange(5.0))).all()
    mean, low, high = mean_interval(np.arange(100.0))
    assert mean == 49.5 and 42 < low < 46 and 53 < high < 57


def test_a_crystal_without_a_graph_has_no_number_of_nodes(tmp_path):
    results = write_results(tmp_path, SETTINGS | {"targets": ["band_gap"], "models": ["cast"]})
    index = pd.read_parquet(results / "graphs" / "index.parquet")
    index.loc[1, ["status", "n_nodes"]] = ["failed: no atoms", 0]
    index.to_parquet(results / "graphs" / "index.parquet")
    nodes = read_crystals(results)["n_nodes"]
    assert np.isnan(nodes["m-1"]) and nodes.isna().sum() == 1
