"""The whole DAG on the smoke preset: it ends, nothing is left to do, a change reruns only what it touches."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1500)  # the whole run takes minutes, more on a machine that others load
PRESET = ("--cores", "2", "--configfile", "workflow/presets/smoke.yaml")
MODELS = (
    "structure_only",
    "text_only",
    "crysmmnet_frozen",
    "crysmmnet_lora",
    "multimat",
    "cast_scratch",
    "cast",
)
BITS = ("metrics.json", "predictions.parquet", "history.csv", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def finished(clone, snakemake) -> Path:
    folder = clone()
    ended = snakemake(folder, *PRESET, "--show-failed-logs")
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert "report: results/smoke/report.html" in ended.stdout
    return folder


def jobs(output: str) -> dict[str, int]:
    """Number of planned jobs by rule, from the statistics of a dry run."""
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", output, re.M) if rule != "total"}


def test_every_run_is_in_the_tables(finished: Path):
    with (finished / "results/smoke/tables/runs.csv").open() as handle:
        runs = list(csv.DictReader(handle))
    expected = {(t, m, s) for t in ("total_energy", "log_bulk_modulus") for m in MODELS for s in ("0", "1")}
    assert {(run["target"], run["model"], run["seed"]) for run in runs} == expected
    assert {run["status"] for run in runs} == {"finished"}
    assert all(float(run["mae"]) > 0 for run in runs)
    with (finished / "results/smoke/tables/table1.csv").open() as handle:
        assert {row["model"] for row in csv.DictReader(handle)} >= set(MODELS)


def test_the_report_is_one_small_file_that_says_what_it_is(finished: Path):
    report = (finished / "results/smoke/report.html").read_text()
    assert len(report) < 10_000_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//[^"' >]+\.(js|css|woff2?|png|svg)""", report)
    assert "smoke" in report
    for model in ("coGN", "CrysMMNet", "MultiMat", "CAST"):
        assert model in report


def test_nothing_is_left_to_do(finished: Path, snakemake):
    assert "Nothing to be done" in snakemake(finished, *PRESET, "-n").stdout


def test_the_report_rebuilds_from_an_archive_alone(finished: Path, rebuild_from_archive):
    rebuilt = rebuild_from_archive(finished, "smoke", *PRESET)
    assert {"tables/evidence.csv", "figures/text_changes.svg", "figures/attention_maps.svg"} <= rebuilt


def test_touched_caches_rerun_nothing(finished: Path, snakemake):
    results = finished / "results/smoke"
    caches = [results / "materials.parquet", results / "descriptions.parquet"]
    for stage in ("graphs", "tokens", "text_states", "materials"):
        caches += [file for file in (results / stage).rglob("*") if file.is_file()]
    assert len(caches) > 10
    for file in caches:
        file.touch()
    assert "Nothing to be done" in snakemake(finished, *PRESET, "-n").stdout


def test_a_models_settings_rerun_that_model_only(finished: Path, snakemake):
    (finished / "change.yaml").write_text("architecture: {concat: {dropout: 0.2}}")
    output = snakemake(finished, "-n", *PRESET, "change.yaml").stdout
    trained = set(re.findall(r"model=(\w+)", output))
    assert trained == {"crysmmnet_frozen", "crysmmnet_lora"}, output[-3000:]
    assert not {"build_graphs", "tokenize_text", "embed_text", "pretrain_model"} & set(jobs(output))


def test_the_same_seed_gives_the_same_bits(finished: Path, snakemake):
    folder = finished / "results/smoke/runs/log_bulk_modulus/cast_scratch"

    def bits() -> dict[str, str]:
        return {
            f"{seed}/{name}": hashlib.sha256((folder / seed / name).read_bytes()).hexdigest()
            for seed in ("0", "1")
            for name in BITS
        }

    before = bits()
    shutil.rmtree(folder)  # its checkpoints too: trained again from the start
    target = "results/smoke/runs/log_bulk_modulus/cast_scratch/0/metrics.json"
    assert snakemake(finished, target, *PRESET).returncode == 0
    assert bits() == before


def test_snakemakes_own_report_works(finished: Path, snakemake):
    ended = snakemake(finished, *PRESET, "--report", "results/smoke/snakemake.html")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert (finished / "results/smoke/snakemake.html").stat().st_size > 100_000


def test_pretraining_never_sees_a_test_crystal(finished: Path):
    results = finished / "results/smoke"
    splits = [json.loads(file.read_text()) for file in (results / "splits").glob("*.json")]
    held_out = {identifier for split in splits for identifier in split["validation"] + split["test"]}
    train = {identifier for split in splits for identifier in split["train"]}
    assert len(splits) == 2
    assert train
    assert not train & held_out
    record = json.loads((results / "pretrain/masked_node/0/metrics.json").read_text())
    assert record["n"]["train"] == len(train)


def test_the_cost_of_the_papers_run_is_predicted(finished: Path, snakemake):
    ended = snakemake(finished, "results/smoke/predicted_cost.json", *PRESET)
    assert ended.returncode == 0, ended.stdout[-3000:]
    cost = json.loads((finished / "results/smoke/predicted_cost.json").read_text())
    assert cost["stages"]["train_model"]["jobs"] == 28
    assert cost["crystals"] == 114398
    walls = {int(n): wall["hours"] for n, wall in cost["wall"].items()}
    assert walls[1] > walls[8] >= walls[64] > 0
    assert cost["device_hours"] / 64 < walls[64]
    assert cost["mean_size"]["band_gap"]["tokens_full"] == 2326.0
    assert cost["disk_gb"] > 2 * 768 * cost["mean_size"]["total_energy"]["tokens"] * 114398 / 1e9
    assert any("multiply-adds" in note and "cast " in note for note in cost["notes"])
    assert any("precision" in note and "not scaled" in note for note in cost["notes"])


def test_a_run_folder_holds_few_files(finished: Path):
    runs = finished / "results/smoke/runs/total_energy/cast"
    for seed in ("0", "1"):
        files = [*(runs / seed).iterdir(), *(runs / "checkpoints" / seed).iterdir()]
        assert len(files) < 10
