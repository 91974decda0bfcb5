"""The composition study from the bundled crystals to its report, tiny; a CSV without structures."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

TINY = {
    "training": {"seeds": [0, 1]},
    "compositions": {
        "models": ["baseline", "random_forest", "edm_transformer"],
        "structures": False,
        "random_forest": {"trees": 10},
        "edm_transformer": {"width": 24, "layers": 1, "heads": 2, "feedforward": 24},
        "training": {"epochs": 2},
        "screening": {"a": ["Cs", "Rb", "K"], "b": ["Sn", "Mg", "Ca"], "x": ["Cl", "F"], "top": 10},
    },
}
PRESET = ("--cores", "2", "--configfile", "workflow/presets/perovskite.yaml", "tiny.yaml")
TABLES = (
    "composition_gap",
    "composition_stability",
    "composition_runs",
    "composition_calibration",
    "enrichment",
)


@pytest.fixture(scope="module")
def finished(clone, snakemake) -> Path:
    folder = clone()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    ended = snakemake(folder, *PRESET, "--show-failed-logs")
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert "report: results/perovskite/report.html" in ended.stdout
    return folder


def test_every_run_is_in_the_tables(finished: Path):
    tables = finished / "results/perovskite/tables"
    with (tables / "composition_runs.csv").open() as handle:
        runs = list(csv.DictReader(handle))
    models = TINY["compositions"]["models"]
    assert {(run["model"], run["seed"]) for run in runs} == {(m, s) for m in models for s in ("0", "1")}
    assert {run["status"] for run in runs} == {"finished"}
    for name in TABLES:
        with (tables / f"{name}.csv").open() as handle:
            assert list(csv.DictReader(handle)), name


def test_the_report_is_one_file_with_plot_and_threshold(finished: Path):
    report = (finished / "results/perovskite/report.html").read_text()
    assert len(report) < 10_000_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//[^"' >]+\.(js|css|woff2?|png|svg)""", report)
    assert report.count("energy above hull ≤ 0 eV/atom") > 5
    points = json.loads(re.search(r"const candidates = (\{.*\});", report)[1])
    summary = json.loads((finished / "results/perovskite/screening/summary.json").read_text())
    assert len(points["formula"]) == summary["in_window"] > 0
    assert "screen-plot" in report


def test_nothing_is_left_to_do(finished: Path, snakemake):
    assert "Nothing to be done" in snakemake(finished, *PRESET, "-n").stdout


def test_the_report_rebuilds_from_an_archive_alone(finished: Path, rebuild_from_archive):
    rebuilt = rebuild_from_archive(finished, "perovskite", *PRESET)
    assert {"tables/composition_gap.csv", "figures/composition_attention.svg"} <= rebuilt


def test_a_run_folder_holds_few_files(finished: Path):
    runs = finished / "results/perovskite/composition_runs/edm_transformer"
    for seed in ("0", "1"):
        assert len([*(runs / seed).iterdir(), *(runs / "checkpoints" / seed).iterdir()]) < 10


def test_screening_settings_retrain_nothing(finished: Path, snakemake):
    (finished / "change.yaml").write_text("compositions: {screening: {bartel: null}}")
    output = snakemake(finished, "-n", *PRESET, "change.yaml").stdout
    assert "screen_compositions" in output
    assert not re.search(r"^(train_compositions|fit_baseline|collect_compositions) ", output, re.M)


def test_structures_get_the_split_of_their_formulas(finished: Path, snakemake):
    """With structures the models of crystals are planned, by the composition's split alone."""
    (finished / "structures.yaml").write_text("compositions: {structures: true}")
    output = snakemake(finished, "-n", *PRESET, "structures.yaml").stdout
    assert re.search(r"^split_structures +1$", output, re.M), output[-3000:]
    assert re.search(r"^train_model +4$", output, re.M)  # coGN and CAST, gap and energy above hull
    assert not re.search(r"^(split_materials|render_report) ", output, re.M)


def test_a_table_of_formulas_is_enough(finished: Path, snakemake):
    with (finished / "own.csv").open("w") as handle:
        handle.write("compound,Eg (eV),hull\n")
        pairs = [(a, b, x) for a in ("Ca", "Sr", "Ba") for b in ("Ti", "Zr", "Sn") for x in ("O", "S")]
        for i, (a, b, x) in enumerate(pairs):
            handle.write(f"{a}{b}{x}3,{0.1 * i:.1f},{0.0 if i % 3 else 0.1}\n")
        handle.write("nonsense,1,0\n")
    columns = {"formula": "compound", "band_gap": "Eg (eV)", "energy_above_hull": "hull"}
    own = {"dataset": "own", "materials": {"source": "local", "path": "own.csv", "columns": columns}}
    (finished / "own.yaml").write_text(yaml.safe_dump(own))
    target = "results/own/splits/compositions.json"
    ended = snakemake(finished, target, *PRESET, "own.yaml", "--show-failed-logs")
    assert ended.returncode == 0, ended.stdout[-4000:]
    split = json.loads((finished / target).read_text())
    assert sum(len(split[part]) for part in ("train", "validation", "test")) == 18
    log = (finished / "results/own/logs/collect_compositions.log").read_text()
    assert "own.csv-19" not in log
    assert sum("unreadable formula" in line for line in log.splitlines()) == 1


@pytest.mark.parametrize(
    ("overlay", "named"),
    [
        ({"compositions": {"models": ["baseline"]}}, "edm_transformer is missing"),
        ({"compositions": {"regression": ["formation_energy"]}}, "needs band_gap"),
        ({"compositions": {"edm_transformer": {"heads": 5}}}, "compositions.edm_transformer.heads"),
        ({"compositions": {"classification": {"colour": 1}}}, "colour"),
    ],
)
def test_a_wrong_config_is_refused_before_any_job(finished: Path, snakemake, overlay: dict, named: str):
    (finished / "wrong.yaml").write_text(yaml.safe_dump(overlay))
    ended = snakemake(finished, "-n", *PRESET, "wrong.yaml")
    assert ended.returncode != 0
    assert named in ended.stdout
