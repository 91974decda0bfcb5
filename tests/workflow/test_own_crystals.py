"""A user's own file, bad records and all, goes through to the report; what cannot go on says why."""

import csv
import json
from pathlib import Path

import pytest
import yaml

FILTERS = {"max_formation_energy": None, "max_energy_above_hull": None, "min_formation_energy": None}


def rocksalt(a: float, cation: str = "Na", anion: str = "Cl") -> dict:
    return {
        "lattice": [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]],
        "species": [cation, anion],
        "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
    }


def records() -> list[dict]:
    """Thirty good crystals (five with a shear modulus) and one of each bad kind."""
    cations, anions = ("Li", "Na", "K", "Rb", "Cs", "Mg"), ("F", "Cl", "Br", "I", "O")
    good = [
        {
            "id": f"own-{i}",
            **rocksalt(4 + 0.1 * i, cations[i % 6], anions[i // 6]),
            "e": -3.0 - 0.05 * i,
            "elastic": {"k": 20.0 + i, "g": 10.0 + i if i < 5 else None},
        }
        for i in range(30)
    ]
    bad = [
        {"id": "own-broken", "cif": "data_x\n_cell_length_a nonsense", "e": -1.0},
        {"id": "own-overlap", **rocksalt(0.6), "e": -1.0},
        {"id": "own-element", **rocksalt(5, "Xx"), "e": -1.0},
        {"id": "own-0", **rocksalt(9.9), "e": -1.0},
        {"id": "own-unlabelled", **rocksalt(5.64)},
    ]
    return good + bad


@pytest.fixture(scope="module")
def own(clone, snakemake) -> Path:
    folder = clone()
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    overlay = {
        "dataset": "own",
        "materials": {
            "source": "local",
            "path": "own.jsonl",
            "sample": None,
            "columns": {
                "material_id": "id",
                "energy_per_atom": "e",
                "k_vrh": "elastic.k",
                "g_vrh": "elastic.g",
            },
            "filters": {**FILTERS, "positive_moduli": False, "ordered_moduli": False},
        },
        "targets": ["total_energy", "log_shear_modulus"],
        "models": ["structure_only", "crysmmnet_frozen"],
        "training": {"seeds": [0], "epochs": 2},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(overlay))
    presets = ("--configfile", "workflow/presets/smoke.yaml", "own.yaml")
    ended = snakemake(folder, "--cores", "2", "--show-failed-logs", *presets)
    assert ended.returncode == 0, ended.stdout[-8000:]
    return folder


def test_each_bad_record_is_counted_and_named(own: Path):
    manifest = json.loads((own / "results/own/materials/manifest.json").read_text())
    assert manifest["n_read"] == 35
    assert manifest["n_kept"] == 31
    records = [entry["record"] for entry in manifest["rejected"]]
    assert records == [
        "own-broken (own.jsonl:31)",
        "own-overlap (own.jsonl:32)",
        "own-element (own.jsonl:33)",
        "own-0 (own.jsonl:34)",
    ]
    log = (own / "results/own/logs/collect_materials.log").read_text()
    for name in ("own-broken", "own-overlap", "own-element", "own-0"):
        assert sum(name in line and "WARNING" in line for line in log.splitlines()) == 1, name


def test_a_target_with_too_few_crystals_is_a_gap_not_an_error(own: Path):
    with (own / "results/own/tables/runs.csv").open() as handle:
        status = {(run["target"], run["model"]): run["status"] for run in csv.DictReader(handle)}
    assert status["log_shear_modulus", "structure_only"] == "skipped"
    assert status["total_energy", "crysmmnet_frozen"] == "finished"
    log = (own / "results/own/logs/split_materials.log").read_text()
    assert sum("log_shear_modulus" in line and "WARNING" in line for line in log.splitlines()) == 1
    assert (own / "results/own/report.html").exists()


def test_an_empty_file_is_one_clear_error(own: Path, snakemake):
    (own / "empty.jsonl").write_text("")
    (own / "empty.yaml").write_text(
        yaml.safe_dump({"dataset": "empty", "materials": {"path": "empty.jsonl"}})
    )
    presets = ("--configfile", "workflow/presets/smoke.yaml", "own.yaml", "empty.yaml")
    ended = snakemake(own, "results/empty/materials.parquet", "--cores", "1", *presets)
    assert ended.returncode != 0
    assert "empty.jsonl" in ended.stdout
    assert "Traceback" not in ended.stdout


@pytest.mark.parametrize(
    ("overlay", "named"),
    [
        ({"models": ["castt"]}, "castt"),
        ({"epochs": 3}, "epochs"),
        ({"attention": {"target": "band_gap"}}, "attention.target"),
    ],
)
def test_a_wrong_config_is_refused_before_any_job(own: Path, snakemake, overlay: dict, named: str):
    (own / "wrong.yaml").write_text(yaml.safe_dump(overlay))
    presets = ("--configfile", "workflow/presets/smoke.yaml", "own.yaml", "wrong.yaml")
    ended = snakemake(own, "-n", *presets)
    assert ended.returncode != 0
    assert named in ended.stdout
