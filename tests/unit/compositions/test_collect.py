"""Collecting and aggregating: a row a formula, and every record that is left out counted by reason."""

import json
from pathlib import Path

import pandas as pd
import pytest

from castbench.compositions.collect import aggregate_compositions, collect_compositions
from castbench.errors import InputError
from composition_data import aggregated, collected, rows

BAD = [
    {"id": "b-parse", "formula": "Ca(TiO", "hull": "0", "gap": "1"},
    {"id": "b-element", "formula": "XxTiO3", "hull": "0", "gap": "1"},
    {"id": "b-hull", "formula": "CaTiO3", "hull": "", "gap": "1"},
    {"id": "b-mark", "formula": "CaTiO3", "hull": "-1", "gap": "1"},
    {"id": "m-0", "formula": "CaTiO3", "hull": "0", "gap": "1"},
    {"id": "b-other", "formula": "Al2O3", "hull": "0", "gap": "1"},
    {"id": "b-long", "formula": "LiNaKRbCsO3", "hull": "0", "gap": "1"},
]


def test_bad_records_are_counted_and_the_others_go_on(tmp_path: Path):
    manifest = json.loads((collected(tmp_path, rows() + BAD) / "manifest.json").read_text())
    assert manifest["n_read"] == len(rows()) + len(BAD)
    assert manifest["n_kept"] == len(rows())
    assert manifest["by_reason"] == {
        "unreadable formula": 1,
        "element without embedding": 1,
        "no energy above hull": 1,
        "impossible energy above hull": 1,
        "duplicate id": 1,
        "not ABX3": 2,
    }
    named = [entry["record"].split(" ")[0] for entry in manifest["rejected"]]
    assert named == ["b-parse", "b-element", "b-hull", "b-mark", "m-0"]  # what is not ABX3 is no mistake


def test_a_compound_below_the_hull_of_all_others_is_kept(tmp_path: Path):
    own = [*rows(), {"id": "below", "formula": "CaTaO3", "hull": "-0.041", "gap": "1"}]
    table = pd.read_parquet(collected(tmp_path, own) / "polymorphs.parquet").set_index("material_id")
    assert table.loc["below", "energy_above_hull"] == -0.041


def test_a_missing_gap_is_null_and_kept(tmp_path: Path):
    own = rows()
    own[5]["gap"] = ""
    folder = aggregated(tmp_path, own)
    table = pd.read_parquet(folder / "compositions.parquet").set_index("material_id")
    assert table["band_gap"].isna().sum() == 1
    assert json.loads((folder / "manifest.json").read_text())["missing"]["band_gap"] == 1


def test_fractions_in_a_source_are_read(tmp_path: Path):
    records = [
        {"id": "a", "fractions": {"Ca": 0.2, "Ti": 0.2, "O": 0.6}, "e_above_hull": 0.0},
        {"id": "b", "fractions": {"Ca": 0.2, "Ti": 0.2, "O": 0.5}, "e_above_hull": 0.0},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"source": "local", "path": str(path), "columns": {}, "max_elements": 4}
    collect_compositions(settings, tmp_path / "p.parquet", tmp_path / "m.json")
    assert pd.read_parquet(tmp_path / "p.parquet")["formula"].tolist() == ["CaTiO3"]
    assert json.loads((tmp_path / "m.json").read_text())["by_reason"] == {"fractions do not sum to 1": 1}


def test_bundled_crystals_need_no_mapping(root: Path, tmp_path: Path):
    path = str(root / "workflow/resources/demo/crystals.jsonl.zst")
    settings = {"source": "demo", "path": path, "columns": {}, "max_elements": 4}
    collect_compositions(settings, tmp_path / "p.parquet", tmp_path / "m.json")
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert len(table) >= 10
    assert table["material_id"].str.startswith("demo-").all()


def test_a_mapping_that_nothing_has_is_refused(tmp_path: Path):
    columns = {"energy_above_hull": "hull", "band_gap": "gapp"}
    with pytest.raises(InputError, match=r"materials.columns.band_gap.*gapp"):
        collected(tmp_path, rows(), columns=columns)


def test_a_source_without_perovskites_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no ABX3 compound.*1 not ABX3"):
        collected(tmp_path, [{"id": "1", "formula": "Al2O3", "hull": "0", "gap": "1"}])


def test_the_polymorph_of_lowest_energy_stands_for_its_formula(tmp_path: Path):
    own = [
        {"id": "high", "formula": "CaTiO3", "hull": "0.2", "gap": "3"},
        {"id": "z-low", "formula": "TiCaO3", "hull": "0.1", "gap": "2"},
        {"id": "a-low", "formula": "Ca2Ti2O6", "hull": "0.1", "gap": "1"},
        {"id": "other", "formula": "BaTiO3", "hull": "0", "gap": "2"},
    ]
    for order in (own, own[::-1]):
        folder = collected(tmp_path, order)
        aggregate_compositions(folder / "polymorphs.parquet", folder / "compositions.parquet")
        table = pd.read_parquet(folder / "compositions.parquet").set_index("formula")
        assert table.index.tolist() == ["BaTiO3", "CaTiO3"]
        assert table.loc["CaTiO3", "material_id"] == "a-low"
        assert (table.loc["CaTiO3", "band_gap"], table.loc["CaTiO3", "n_polymorphs"]) == (1.0, 3)


def test_the_reports_own_table(shared_data: Path, tmp_path: Path):
    """Its column `stable` is the threshold 0, and about half of a test set by rows would be known."""
    from castbench.compositions.splits import split_compositions

    columns = {"energy_above_hull": "energy_above_hull (eV/atom)", "band_gap": "band_gap (eV)"}
    settings = {"source": "local", "path": str(shared_data / "perovskites.csv.zst"), "columns": columns}
    collect_compositions(settings | {"max_elements": 4}, tmp_path / "p.parquet", tmp_path / "m.json")
    manifest = json.loads((tmp_path / "m.json").read_text())
    assert (manifest["n_read"], manifest["n_kept"]) == (4088, 4086)
    polymorphs = pd.read_parquet(tmp_path / "p.parquet")
    assert (polymorphs["energy_above_hull"] <= 0).sum() == 923
    aggregate_compositions(tmp_path / "p.parquet", tmp_path / "c.parquet")
    assert len(pd.read_parquet(tmp_path / "c.parquet")) == polymorphs["formula"].nunique() == 2401
    own = {"seed": 0, "fractions": [0.8, 0.1, 0.1], "classification": {"stability": 0.0}, "regression": []}
    split_compositions(own, tmp_path / "p.parquet", tmp_path / "c.parquet", tmp_path / "s.json")
    by_rows = json.loads((tmp_path / "s.json").read_text())["by_rows"]
    assert 0.4 < by_rows["n_leaked"] / by_rows["n_test"] < 0.6


def test_a_missing_id_is_made_of_file_and_row(tmp_path: Path):
    own = [row | {"id": row["id"] * (number % 2)} for number, row in enumerate(rows())]
    table = pd.read_parquet(collected(tmp_path, own) / "polymorphs.parquet")
    expected = [row["id"] or f"own.csv-{number}" for number, row in enumerate(own, 1)]
    assert table["material_id"].tolist() == expected


@pytest.mark.parametrize("name", ["formula", "formula_pretty", "reduced_formula"])
def test_usual_names_of_a_formula_need_no_mapping(tmp_path: Path, name: str):
    own = [{name: row["formula"]} | {key: row[key] for key in ("id", "hull", "gap")} for row in rows()]
    assert len(pd.read_parquet(collected(tmp_path, own) / "polymorphs.parquet")) == len(rows())
