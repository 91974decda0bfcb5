"""An archive holds what a report is made from and no weights or hidden files; its bytes are reproducible."""

import json
import zipfile
from pathlib import Path

import pytest

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
    assert all(f"\nrule {rule}:" in known for rule in RULES[study].split())


def test_there_must_be_a_report(results: Path, tmp_path: Path):
    (results / "report.html").unlink()
    with pytest.raises(InputError, match="no report"):
        archive_results({"dataset": "invented", "study": "cast"}, results, tmp_path / "archive.zip")
