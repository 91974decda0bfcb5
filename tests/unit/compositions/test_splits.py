"""No formula is on both sides, both classes are in every part, and structures follow their formulas."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.compositions.splits import split_structures
from castbench.errors import InputError
from castbench.materials.splits import PARTS, load_split
from composition_data import aggregated, rows, split


def test_every_formula_is_in_one_part(data: Path):
    lists = load_split(data / "split.json")
    formulas = [formula for part in PARTS for formula in lists[part]]
    assert sorted(formulas) == pd.read_parquet(data / "compositions.parquet")["formula"].tolist()
    sizes = [len(lists[part]) for part in PARTS]
    assert all(abs(n - share * 36) <= 1 for n, share in zip(sizes, (0.6, 0.2, 0.2), strict=True))


def test_parts_are_stratified_by_stability(data: Path):
    record = load_split(data / "split.json")
    stable = pd.read_parquet(data / "compositions.parquet").set_index("formula")["energy_above_hull"] <= 0
    for part in PARTS:
        assert record["classes"][part]["stable"] == stable[record[part]].sum()
        assert abs(stable[record[part]].mean() - stable.mean()) < 0.15


def test_a_split_is_a_function_of_the_seed(data: Path, tmp_path: Path):
    first = json.loads((data / "split.json").read_text())
    folder = aggregated(tmp_path, rows()[::-1])
    split(folder)
    assert json.loads((folder / "split.json").read_text())["checksum"] == first["checksum"]
    split(folder, seed=1)
    assert json.loads((folder / "split.json").read_text())["checksum"] != first["checksum"]


@pytest.mark.parametrize(("threshold", "only"), [(10.0, "stable"), (-0.5, "unstable")])
def test_one_class_only_is_refused(data: Path, tmp_path: Path, threshold: float, only: str):
    folder = aggregated(tmp_path, rows())
    with pytest.raises(InputError, match=f"all 36 formulas are {only}.*classification.stability"):
        split(folder, classification={"stability": threshold})


def test_a_part_without_a_value_of_a_target_is_refused(tmp_path: Path):
    folder = aggregated(tmp_path, [row | {"gap": "" if i > 3 else "1"} for i, row in enumerate(rows())])
    with pytest.raises(
        InputError, match=r"[34] of 36 formulas have a band_gap, and none in .*column band_gap"
    ):
        split(folder, seed=3)
    split(folder, regression=[])


def test_a_class_that_training_has_none_of_is_refused(tmp_path: Path):
    folder = aggregated(tmp_path, [row | {"gap": "1"} for row in rows()])
    with pytest.raises(InputError, match=r"every formula is non-metal \(metal: .*classification.metallicity"):
        split(folder, classification={"stability": 0.0, "metallicity": 0.0})


def test_too_few_formulas_are_refused(tmp_path: Path):
    folder = aggregated(tmp_path, rows()[1:6])
    with pytest.raises(InputError, match="5 ABX3 formulas, and 10 are the fewest"):
        split(folder)


def test_leakage_counts_test_rows_whose_formula_is_in_training(tmp_path: Path):
    twice = [row | {"id": f"{row['id']}-{n}"} for row in rows()[1:] for n in range(20)]
    folder = aggregated(tmp_path, twice)
    split(folder)
    by_rows = load_split(folder / "split.json")["by_rows"]
    assert by_rows == {"n_rows": 720, "n_test": 144, "n_leaked": 144}
    folder = aggregated(tmp_path, rows()[1:])
    split(folder)
    assert load_split(folder / "split.json")["by_rows"]["n_leaked"] == 0


def test_structures_follow_their_formula(data: Path, tmp_path: Path):
    lists = load_split(data / "split.json")
    chosen = pd.read_parquet(data / "compositions.parquet").set_index("formula")["material_id"]
    ids = [*chosen, "m-first", "unknown"]  # another polymorph, and no perovskite
    targets = [["band_gap"]] * len(ids)
    pq.write_table(pa.table({"material_id": ids, "targets": targets}), tmp_path / "materials.parquet")
    settings = {"targets": ["band_gap", "energy_above_hull"], "seed": 0, "fractions": [0.6, 0.2, 0.2]}
    split_structures(
        settings, tmp_path / "materials.parquet", data / "compositions.parquet", data / "split.json", tmp_path
    )
    own = load_split(tmp_path / "band_gap.json")
    for part in PARTS:
        assert own[part] == sorted(chosen[lists[part]])
    assert load_split(tmp_path / "energy_above_hull.json")["reason"] == "no crystal of a formula in train"
