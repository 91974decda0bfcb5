"""On a real Slurm, with trainings and a node killed in the middle, the pipeline ends as a local run does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import slurm

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("workflow/presets/smoke.yaml", "tests/cluster/small.yaml")
PROFILE = ("--workflow-profile", "workflow/profiles/slurm")
# Only how often Slurm is asked, and whom: accounting is off in the test cluster.
QUICK = (
    "--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "3",
    "--slurm-status-command", "squeue", "--latency-wait", "10",
)  # fmt: skip
RUNS = Path("results/cluster/runs/total_energy")
LOGS = Path("results/cluster/logs/train_model")


def copy(folder: Path) -> Path:
    """What git would commit, and the text encoder if it was fetched already."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    encoders = ROOT / "results" / "encoders"
    if encoders.is_dir():
        shutil.copytree(encoders, folder / "results" / "encoders", dirs_exist_ok=True)
    return folder


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start Snakemake in a folder; its output goes to a file beside the folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), slurm.search_path()])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", "--configfile", *PRESETS, *arguments]
    with folder.with_suffix(".out").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.lack():
        pytest.skip(reason)
    with slurm.Cluster(gpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(tmp_path_factory.mktemp("local") / "castbench")
    ended = snakemake(folder, "--cores", "2").wait(900)
    assert ended == 0, folder.with_suffix(".out").read_text()[-8000:]
    return folder


def training_jobs(cluster: slurm.Cluster, state: str = "RUNNING") -> dict[str, str]:
    """Model and Slurm id of the training jobs in a state."""
    rows = cluster.ask("squeue", "-ho", "%i %k", f"--states={state}").splitlines()
    found = (re.match(r"(\d+) rule_train_model_wildcards_\w+?_total_energy_(\w+)", row) for row in rows)
    return {match[2]: match[1] for match in found if match}


def log_of(folder: Path, model: str) -> str:
    """The log of a training; empty where there is none yet, or none any more because the job starts again."""
    try:
        return (folder / LOGS / f"total_energy.{model}.log").read_text()
    except FileNotFoundError:
        return ""


def files(folder: Path) -> dict[str, bytes]:
    """Tables and records, but for what times and places are in."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for pattern in ("tables/table*", "tables/comparisons.csv", "runs/*/*/*/*", "splits/*")
        for file in sorted((folder / "results/cluster").glob(pattern))
        if file.name != "cost.json" and "checkpoints" not in file.parts
    }


def test_a_run_with_killed_jobs_and_a_dead_node_gives_the_tables_of_a_local_one(
    cluster: slurm.Cluster, local: Path, tmp_path: Path
):
    folder = copy(tmp_path / "castbench")
    shutil.copytree(local / "results/encoders", folder / "results/encoders", dirs_exist_ok=True)
    started = time.monotonic()
    run = snakemake(folder, *PROFILE, *QUICK)
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.3):
            most = max(most, len(training_jobs(cluster)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        until = lambda condition, what: slurm.wait_for(  # noqa: E731
            lambda: condition() or run.poll() is not None, what, 300
        )
        # Preemption: a training gets SIGTERM, writes a checkpoint, and Snakemake starts it again.
        until(lambda: " epoch " in log_of(folder, "structure_only"), "a training")
        job = training_jobs(cluster)["structure_only"]
        cluster.ask("scancel", "--signal=TERM", job)
        until(lambda: "stopped by SIGTERM" in log_of(folder, "structure_only"), "its checkpoint")
        assert list((folder / RUNS / "structure_only/checkpoints/0").glob("*.safetensors"))
        until(lambda: "continuing after step" in log_of(folder, "structure_only"), "its continuation")
        assert training_jobs(cluster)["structure_only"] != job
        # A node dies with all that runs on it and comes back, and Slurm itself starts the same job again.
        until(lambda: " epoch " in log_of(folder, "crysmmnet_frozen"), "the second training")
        job = training_jobs(cluster)["crysmmnet_frozen"]
        cluster.kill_node()
        until(lambda: "down" in cluster.ask("sinfo", "-ho", "%T"), "the loss of the node")
        cluster.start_node()
        until(lambda: training_jobs(cluster).get("crysmmnet_frozen") == job, "the requeue")
        # A training is killed as the kernel does when memory is short.
        until(lambda: " epoch " in log_of(folder, "cast_scratch"), "the third training")
        os.kill(cluster.process_of("train_model", "cast_scratch"), signal.SIGKILL)
        assert run.wait(600) == 0, folder.with_suffix(".out").read_text()[-8000:]
    finally:
        ended.set()
        watcher.join()
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
        print(folder.with_suffix(".out").read_text()[-20000:])
    print(f"{time.monotonic() - started:.0f} s, at most {most} trainings at once")
    assert most == 2  # one a card
    assert (folder / "results/cluster/report.html").exists()
    expected = files(local)
    assert len(expected) > 10
    assert files(folder) == expected
