"""Two small files in Matbench's format through the whole study, and what cannot go on says why."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

from castbench.labels import FOLDS
from matbench_data import write_task

TINY = {
    "dataset": "tiny",
    "materials": {"path": "files"},
    "targets": ["matbench_jdft2d", "matbench_mp_is_metal"],
    "architecture": {"cogn": {"width": 32, "depth": 2}, "cross_attention": {"width": 32, "heads": 4}},
    "training": {"epochs": 2, "device": "cpu"},
}
PRESET = ("--cores", "2", "--configfile", "workflow/presets/matbench.yaml", "tiny.yaml")
SIZES = {"matbench_jdft2d": 30, "matbench_mp_is_metal": 25}


@pytest.fixture(scope="module")
def finished(clone, snakemake) -> Path:
    folder = clone()
    for task, n in SIZES.items():
        write_task(folder / "files", task, n, overlapping=(7,) if task == "matbench_jdft2d" else ())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    ended = snakemake(folder, *PRESET, "--show-failed-logs")
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert "report: results/tiny/report.html" in ended.stdout
    return folder


def test_every_fold_of_every_task_is_in_the_results(finished: Path):
    path = finished / "results/tiny/matbench/structure_only/0/results.json.gz"
    tasks = json.loads(gzip.decompress(path.read_bytes()))["tasks"]
    for task, n in SIZES.items():
        prefix = task.replace("matbench", "mb").replace("_", "-")
        folds = tasks[task]["results"].values()
        ids = [name for fold in folds for name in fold["data"]]
        assert len(folds) == FOLDS
        assert sorted(ids) == [f"{prefix}-{i:02d}" for i in range(1, n + 1)]
    with (finished / "results/tiny/tables/matbench_folds.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert {row["status"] for row in rows} == {"finished"} and len(rows) == 2 * FOLDS
    assert sum(int(row["filled"]) for row in rows) == 1  # the crystal whose atoms overlap


def test_the_report_has_ours_beside_the_published_and_says_whose_data_it_is(finished: Path):
    report = (finished / "results/tiny/report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//[^"' >]+\.(js|css|woff2?|png|svg)""", report)
    assert "coGN, published" in report and "37.17 ± 13.68" in report
    assert "own data" in report and "Not as Matbench published them" in report
    assert "results/tiny/matbench/structure_only/0/results.json.gz" in report


def test_the_report_rebuilds_from_an_archive_alone(finished: Path, rebuild_from_archive):
    assert "tables/matbench_folds.csv" in rebuild_from_archive(finished, "tiny", *PRESET)


def test_no_text_is_made_where_no_model_reads_one(finished: Path, snakemake):
    assert not (finished / "results/tiny/descriptions").exists()
    assert "Nothing to be done" in snakemake(finished, *PRESET, "-n").stdout
    change = {"models": ["structure_only", "cast_scratch"]}
    (finished / "text.yaml").write_text(yaml.safe_dump(change))
    planned = snakemake(finished, "-n", *PRESET, "text.yaml").stdout
    assert re.search(r"^describe_shard +4$", planned, re.M), planned[-3000:]
    assert re.search(r"^train_model +10$", planned, re.M)  # CAST's: coGN's runs are finished
    assert not re.search(r"^(pretrain_model|build_graphs|plot_results) ", planned, re.M)


def test_missing_files_are_downloaded(finished: Path, snakemake):
    (finished / "fetch.yaml").write_text(yaml.safe_dump({"dataset": "fetched", "materials": {"path": None}}))
    planned = snakemake(finished, "materials", "-n", *PRESET, "fetch.yaml").stdout
    assert re.search(r"^fetch_matbench +2$", planned, re.M), planned[-3000:]


@pytest.mark.parametrize(
    ("overlay", "named"),
    [
        ({"targets": ["matbench_steels"]}, "matbench_steels"),
        ({"models": ["multimat"]}, "multimat is pretrained"),
        ({"materials": {"path": "nowhere"}}, "nowhere/matbench_jdft2d.json.gz"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_job(finished: Path, snakemake, overlay: dict, named: str):
    (finished / "wrong.yaml").write_text(yaml.safe_dump({"dataset": "wrong"} | overlay))
    ended = snakemake(finished, "-n", *PRESET, "wrong.yaml")
    assert ended.returncode != 0
    assert named in ended.stdout
