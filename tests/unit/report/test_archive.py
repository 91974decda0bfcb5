"""An archive holds what a report is made from and no weights or hidden files; its bytes are reproducible."""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
import yaml

from castbench.errors import InputError
from castbench.report.archive import RULES, archive_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "invented"
    for name in ("report.html", "tables/table1.csv", "runs/total_energy/cast/0/metrics.json",
                 "runs/total_energy/cast/0/model.safetensors",
                 "runs/total_energy/cast/checkpoints/0/1.safetensors",
                 "attention/probes/cast.parquet", "screening/candidates.parquet",
                 "graphs/index.parquet", "graphs/distances.npy", "logs/train_model.log"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_records_code_and_environment_are_in_and_weights_are_not(results: Path, tmp_path: Path):
    output = tmp_path / "archive.zip"
    archive_results({"dataset": "invented", "study": "cast"}, results, output)
    with zipfile.ZipFile(output) as archive:
        names = {name.removeprefix("castbench-invented/") for name in archive.namelist()}
        listed = json.loads(archive.read("castbench-invented/archive.json"))
        command = archive.read("castbench-invented/ARCHIVE.md").decode()
    assert {"Snakefile", "requirements.lock", "configuration.yaml", "src/castbench/cli.py"} <= names
    own = {name for name in names if name.startswith("results/")}
    assert own == {
        f"results/invented/{name}"
        for name in (
            "report.html", "tables/table1.csv", "runs/total_energy/cast/0/metrics.json",
            "graphs/index.parquet", "attention/probes/cast.parquet", "screening/candidates.parquet",
        )
    }  # fmt: skip
    assert set(listed["files"]) == names - {"archive.json", "ARCHIVE.md", "configuration.yaml"}
    assert not [name for name in names if "/." in name or "__pycache__" in name]
    assert "results/invented/report.html" in command
    first = output.read_bytes()
    archive_results({"dataset": "invented", "study": "cast"}, results, output)
    assert output.read_bytes() == first


@pytest.mark.parametrize("study", RULES)
def test_the_rules_that_rebuild_a_report_exist(root: Path, study: str):
    known = "".join(file.read_text() for file in (root / "workflow/rules").glob("*.smk"))
    assert {*RULES[study].split()} <= {*re.findall(r"^ *rule (\w+):$", known, re.M)}


def test_there_must_be_a_report(results: Path, tmp_path: Path):
    (results / "report.html").unlink()
    with pytest.raises(InputError, match="no report"):
        archive_results({"dataset": "invented", "study": "cast"}, results, tmp_path / "archive.zip")


def test_what_is_packed_is_what_the_archive_says(results: Path, tmp_path: Path):
    settings = {"dataset": "invented", "study": "cast", "targets": ["total_energy"], "note": "Å"}
    archive_results(settings, results, tmp_path / "archive.zip")
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        top = "castbench-invented"
        assert yaml.safe_load(archive.read(f"{top}/configuration.yaml")) == settings
        for name, checksum in json.loads(archive.read(f"{top}/archive.json"))["files"].items():
            assert hashlib.sha256(archive.read(f"{top}/{name}")).hexdigest() == checksum, name


def test_records_of_every_study_are_in(results: Path, tmp_path: Path):
    records = ("metrics.json", "cost.json", "config.json", "history.csv", "predictions.parquet", "README.md")
    folders = ("runs/band_gap/cast/1", "pretrain/masked_node/0", "composition_runs/crabnet/0")
    names = {f"{folder}/{name}" for folder in folders for name in records}
    names |= {"figures/parity.svg", "attention/maps.json", "splits/band_gap.json", "funnel.json"}
    names |= {"materials.parquet", "materials/manifest.json", "descriptions.json", "graphs/manifest.json"}
    names |= {"tokens/manifest.json", "tokens/index.parquet", "compositions.parquet"}
    names |= {"compositions/manifest.json", "matbench/a.parquet", "matbench/cast/0/results.json.gz"}
    for name in names:
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    archive_results({"dataset": "invented", "study": "cast"}, results, tmp_path / "archive.zip")
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        assert {f"castbench-invented/results/invented/{name}" for name in names} <= set(archive.namelist())
