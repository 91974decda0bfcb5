import copy
import csv
import json
import logging
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.errors import InputError
from castbench.materials import sources

from .conftest import make_cif


def test_one_bad_record_of_every_kind(collect, salt, caplog):
    cif = salt | {"lattice": None}
    bad = {
        "unreadable record": '{"material_id": "cut',
        "missing structure": {"material_id": "none", "band_gap": 1.0},
        "unreadable structure": cif | {"material_id": "garbled", "cif": "data_\nloop_ nothing"},
        "disordered structure": cif | {"material_id": "mixed", "cif": make_cif("Cs1 Cs 0 0 0 0.5")},
        "unknown element": salt | {"material_id": "alien", "species": ["Cs", "Zz"]},
        "overlapping atoms": salt | {"material_id": "dense", "frac_coords": [[0, 0, 0], [0, 0, 0.01]]},
        "repeated record": salt,
        "duplicate id": salt | {"band_gap": 0.0},
    }
    table, manifest = collect([salt, *bad.values(), salt | {"material_id": "last"}])
    assert table.column("material_id").to_pylist() == ["salt-1", "last"]
    assert table.column("band_gap").to_pylist() == [5.1, 5.1]
    assert manifest["n_read"] == 10
    assert manifest["n_kept"] == 2
    assert manifest["by_reason"] == dict.fromkeys(bad, 1)
    assert [entry["reason"] for entry in manifest["rejected"]] == list(bad)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(bad)
    for number, (warning, reason) in enumerate(zip(warnings, bad, strict=True), 2):
        place = f"crystals.jsonl:{number}"
        record = bad[reason]
        if isinstance(record, dict):
            place = f"{record['material_id']} ({place})"
        assert warning.getMessage().startswith(f"{place}: {reason}")
        assert "\n" not in warning.getMessage()


def test_missing_and_impossible_labels_are_null_and_counted(collect, salt, caplog):
    records = [salt | {"material_id": f"m-{i}"} for i in range(5)]
    del records[1]["band_gap"]
    records[2]["band_gap"] = None
    records[3]["band_gap"] = float("nan")
    records[4]["band_gap"] = -999
    records[4]["energy_above_hull"] = -0.04  # below the hull of all others
    records[3]["energy_above_hull"] = "-1"
    records[0]["energy_per_atom"] = "n/a"
    table, manifest = collect(records)
    assert table.column("band_gap").to_pylist() == [5.1, None, None, None, None]
    assert table.column("energy_per_atom").to_pylist() == [None, -3.4, -3.4, -3.4, -3.4]
    assert manifest["labels"]["band_gap"] == {"present": 1, "missing": 4, "invalid": 2}
    assert manifest["labels"]["energy_per_atom"] == {"present": 4, "missing": 1, "invalid": 0}
    assert [r.getMessage().split(":")[1] for r in caplog.records if "band_gap" in r.getMessage()] == ["4"]
    assert table.column("energy_above_hull").to_pylist()[3:] == [None, -0.04]
    assert "energy_above_hull is '-1', and not a number from -0.999 to 100 eV/atom" in caplog.text


def test_manifest_names_the_file_and_its_hash(collect, salt, tmp_path):
    _, manifest = collect([salt])
    assert manifest["source"] == "local"
    assert manifest["files"][0]["bytes"] == (tmp_path / "crystals.jsonl").stat().st_size
    assert len(manifest["files"][0]["sha256"]) == 64


def test_demo_has_a_licence(collect, salt, tmp_path):
    path = tmp_path / "demo.jsonl"
    path.write_text(json.dumps(salt | {"prototype": "caesium chloride"}))
    table, manifest = collect(path, source="demo")
    assert manifest["licence"] == "CC0-1.0"
    assert table.column("origin").to_pylist() == ["demo"]


def test_csv_parquet_and_json_lines_give_the_same_table(collect, salt, tmp_path):
    cif = make_cif("Cs1 Cs 0 0 0 1", "Cl1 Cl 0.5 0.5 0.5 1")
    columns = {"material_id": "name", "cif": "file", "band_gap": "gap (eV)", "k_vrh": "K"}
    records = [
        {"name": "a", "file": cif, "gap (eV)": 5.1, "K": None},
        {"name": "b", "file": "no CIF", "gap (eV)": 5.1, "K": 1.0},
        {"name": "c", "file": cif.replace("4.1", "4.2"), "gap (eV)": None, "K": 17.0},
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, records[0])
        table.writeheader()
        table.writerows(records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    expected, _ = collect(records, columns)
    assert expected.column("k_vrh").to_pylist() == [None, 17.0]
    for path in (tmp_path / "a.csv", tmp_path / "a.parquet"):
        table, manifest = collect(path, columns)
        assert manifest["by_reason"] == {"unreadable structure": 1}
        assert table.drop(["origin"]).equals(expected.drop(["origin"]))


def test_collected_table_can_be_collected_again(collect, salt, tmp_path):
    first, _ = collect([salt, salt | {"material_id": "b", "text": None}])
    copied = tmp_path / "again.parquet"
    pq.write_table(first, copied)
    second, _ = collect(copied)
    assert second.equals(first)


def test_output_is_the_same_bytes_again(collect, salt, tmp_path):
    collect([salt])
    before = (tmp_path / "collected.parquet").read_bytes(), (tmp_path / "manifest.json").read_bytes()
    collect([salt])
    assert (
        (tmp_path / "collected.parquet").read_bytes(),
        (tmp_path / "manifest.json").read_bytes(),
    ) == before


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        ([""], {}, "has no records"),
        ([{"material_id": "a"}], {}, r"no record is usable \(1 missing structure\)"),
        (["salt"], {"k_vrh": "bulk.vhr"}, r"materials.columns.k_vrh: no record has a value at 'bulk.vhr'"),
    ],
)
def test_input_that_gives_nothing_is_refused_and_leaves_no_file(
    collect, salt, tmp_path, records, columns, message
):
    with pytest.raises(InputError, match=message):
        collect([copy.deepcopy(salt) if record == "salt" else record for record in records], columns)
    assert {path.name for path in tmp_path.iterdir()} == {"crystals.jsonl"}


def test_empty_folder_and_absent_path_are_refused(collect, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no records"):
        collect(tmp_path / "empty")
    with pytest.raises(InputError, match="there is no such file"):
        collect(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"materials.path: is not set"):
        sources.collect_materials(
            {"source": "local", "path": None}, tmp_path / "a.parquet", tmp_path / "a.json"
        )


def test_memory_stays_flat_and_row_groups_small(collect, salt, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 50)
    salt |= {"lattice": [4.1, 4.3, 4.5, 80, 85, 95], "frac_coords": [[0, 0, 0], [0.4, 0.5, 0.6]]}  # quick: P1
    peaks = []
    for count in (150, 450):
        path = tmp_path / "many.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps(salt | {"material_id": f"m-{i}", "text": f"{i} " * 10_000}) + "\n")
        tracemalloc.start()
        sources.collect_materials(
            {"source": "local", "path": str(path)}, tmp_path / "a.parquet", tmp_path / "a.json"
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        written = pq.ParquetFile(tmp_path / "a.parquet").metadata
        assert written.num_rows == count
        assert max(written.row_group(i).num_rows for i in range(written.num_row_groups)) == 50
    # What may grow is the table of ids seen, some 200 bytes each; a record has 40,000.
    assert peaks[1] - peaks[0] < 300 * 2_000


def test_real_crystals_by_the_mapping_of_the_readme(elastic4):
    table = pq.read_table(elastic4 / "collected.parquet")
    manifest = json.loads((elastic4 / "manifest.json").read_text())
    assert manifest["n_kept"] == table.num_rows == 2_880
    assert manifest["by_reason"] == {}
    assert manifest["labels"]["k_vrh"] == {"present": 2651, "missing": 229, "invalid": 0}
    assert manifest["labels"]["energy_above_hull"]["present"] == 0
    assert table.column("text").null_count == 1
    row = table.slice(0, 1).to_pylist()[0]
    expected = {"material_id": "mp-21464", "formula": "CoReB", "spacegroup": 62, "n_sites": 12}
    expected |= {"k_reuss": 351.893, "g_vrh": 122.896, "energy_per_atom": -24.5577224785}
    assert {name: row[name] for name in expected} == expected
    volume = np.linalg.det(np.reshape(row["structure"]["lattice"], (3, 3)))
    assert volume == pytest.approx(3.291599 * 5.626573 * 6.507722)


def test_the_first_rejected_records_are_named_and_all_are_counted(collect, salt, monkeypatch):
    monkeypatch.setattr(sources, "LISTED", 2)
    _, manifest = collect([salt, {"id": "a"}, {"id": "b"}, {"id": "c"}])
    assert [entry["record"] for entry in manifest["rejected"]] == [
        "a (crystals.jsonl:2)",
        "b (crystals.jsonl:3)",
    ]
    assert manifest["by_reason"] == {"missing structure": 3}
