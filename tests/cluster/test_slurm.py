"""On a real Slurm, with trainings and a node killed in the middle, the pipeline ends as a local run does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import slurm

pytestmark = pytest.mark.timeout(1500)  # minutes of it on a machine that others load

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("workflow/presets/smoke.yaml", "tests/cluster/small.yaml")
PROFILE = ("--workflow-profile", "workflow/profiles/mine")
# Only how often Slurm is asked, and whom: accounting is off in the test cluster.
QUICK = (
    "--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "3",
    "--slurm-status-command", "squeue", "--latency-wait", "10",
)  # fmt: skip
TABLE = "results/cluster/tables/table1.csv"
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


def fill_in(folder: Path, **changes: tuple[str, str]) -> None:
    """Copy the profile to a name of one's own and change it there, as its README says."""
    theirs, mine = (folder / "workflow/profiles" / name for name in ("slurm", "mine"))
    shutil.copytree(theirs, mine)
    text = (mine / "config.yaml").read_text()
    for what, (old, new) in changes.items():
        assert text.count(old) == 2, what  # for pretraining and training
        text = text.replace(old, new)
    (mine / "config.yaml").write_text(text)


def snakemake(folder: Path, *arguments: str, presets: tuple[str, ...] = PRESETS) -> subprocess.Popen[str]:
    """Start Snakemake in a folder; its output goes to a file beside the folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), slurm.search_path()])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", *arguments]
    if presets:
        command[3:3] = ["--configfile", *presets]
    with folder.with_suffix(".out").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.lack():
        pytest.skip(reason)
    with slurm.Cluster(gpus=2) as running:
        yield running


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


def start_local(folder: Path, local: Path) -> subprocess.Popen[str]:
    """Start the same run without Slurm, from the same descriptions: no job of theirs is killed."""
    for name in ("materials", "materials.parquet", "funnel.json", "descriptions", "descriptions.parquet",
                 "descriptions.json"):  # fmt: skip
        source, target = folder / "results/cluster" / name, local / "results/cluster" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    shutil.copytree(folder / "results/encoders", local / "results/encoders", dirs_exist_ok=True)
    return snakemake(local, "--cores", "1", "--", TABLE)


def test_a_run_with_killed_jobs_and_a_dead_node_gives_the_tables_of_a_local_one(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, beside = (copy(tmp_path / name / "castbench") for name in ("slurm", "local"))
    fill_in(folder, scratch=("# stage: 1", "stage: 1"))
    started = time.monotonic()
    run = snakemake(folder, *PROFILE, *QUICK, "--", TABLE)

    def until(condition: Callable[[], object], what: str) -> None:
        slurm.wait_for(lambda: bool(condition()) or run.poll() is not None, what, 300)

    local = None
    try:
        # Preemption: a training gets SIGTERM, writes a checkpoint, and Snakemake submits it again.
        until(lambda: " epoch " in log_of(folder, "structure_only"), "a training")
        assert re.search(r"graphs: \S+ GB copied to ", log_of(folder, "structure_only"))
        job = training_jobs(cluster)["structure_only"]
        cluster.ask("scancel", "--signal=TERM", job)
        until(lambda: "stopped by SIGTERM" in log_of(folder, "structure_only"), "its checkpoint")
        assert list((folder / RUNS / "structure_only/checkpoints/0").glob("*.safetensors"))
        until(lambda: "continuing after step" in log_of(folder, "structure_only"), "its continuation")
        assert training_jobs(cluster)["structure_only"] != job
        # The node dies with all that runs on it and comes back; Slurm itself starts the same job again.
        until(lambda: " epoch " in log_of(folder, "crysmmnet_frozen"), "the second training")
        local = start_local(folder, beside)
        job = training_jobs(cluster)["crysmmnet_frozen"]
        cluster.kill_node()
        assert "crysmmnet_frozen" not in training_jobs(cluster)
        (folder / LOGS / "total_energy.crysmmnet_frozen.log").unlink()  # the next one is of the second start
        cluster.start_node()
        until(lambda: training_jobs(cluster).get("crysmmnet_frozen") == job, "the requeue")
        # A training is killed as the kernel does when memory is short.
        until(lambda: " epoch " in log_of(folder, "crysmmnet_frozen"), "the second training again")
        os.kill(cluster.process_of("train_model", "crysmmnet_frozen"), signal.SIGKILL)
        assert run.wait(600) == 0, folder.with_suffix(".out").read_text()[-8000:]
    finally:
        if run.poll() is None:
            run.kill()
            if local:
                local.kill()
            print(folder.with_suffix(".out").read_text()[-8000:])
    on_slurm = time.monotonic() - started

    assert local.wait(300) == 0, beside.with_suffix(".out").read_text()[-8000:]
    print(f"{on_slurm:.0f} s on Slurm, {time.monotonic() - started - on_slurm:.0f} s more beside it")
    expected = files(beside)
    assert len(expected) >= 15
    assert files(folder) == expected


@pytest.fixture
def long_training(cluster: slurm.Cluster, tmp_path: Path) -> Iterator[tuple[Path, Callable[..., None]]]:
    """A training of many minutes under a limit of three: its folder, and a function that waits."""
    folder = copy(tmp_path / "castbench")
    fill_in(folder, limit=("runtime: 480 * attempt", "runtime: 3 * attempt"))
    (folder / "long.yaml").write_text("models: [structure_only]\ntraining: {epochs: 12000}\n")
    target, presets = str(RUNS / "structure_only/0/metrics.json"), (*PRESETS, "long.yaml")
    run = snakemake(folder, *PROFILE, *QUICK, "--", target, presets=presets)

    def until(condition: Callable[[], object], what: str) -> None:
        slurm.wait_for(lambda: bool(condition()) or run.poll() is not None, what, 400)

    yield folder, until
    run.kill()
    cluster.ask("scancel", "--user=root")
    print(folder.with_suffix(".out").read_text()[-8000:])


def test_a_training_out_of_time_is_submitted_again_with_more_and_continues(cluster, long_training):
    """Slurm looks at limits twice a minute: of three minutes, the profile's signal comes after 60 to 90 s."""
    folder, until = long_training
    until(lambda: training_jobs(cluster), "a training")
    job = training_jobs(cluster)["structure_only"]
    assert cluster.ask("squeue", "-ho", "%l", "-j", job) == "3:00"
    until(lambda: "stopped by SIGTERM" in log_of(folder, "structure_only"), "its time limit")
    assert list((folder / RUNS / "structure_only/checkpoints/0").glob("*.safetensors"))
    until(lambda: "continuing after step" in log_of(folder, "structure_only"), "its continuation")
    again = training_jobs(cluster)["structure_only"]
    assert again != job
    assert cluster.ask("squeue", "-ho", "%l", "-j", again) == "6:00"


def test_a_training_that_makes_room_for_an_urgent_job_continues_after_it(cluster, long_training):
    folder, until = long_training
    until(lambda: " epoch " in log_of(folder, "structure_only"), "a training")
    urgent = ("--partition=urgent", f"--gpus={cluster.gpus}", "--output=/dev/null", "--wrap=sleep 5")
    assert cluster.ask("sbatch", "--parsable", *urgent).isdigit()
    until(lambda: "stopped by SIGTERM" in log_of(folder, "structure_only"), "the preemption")
    until(lambda: "continuing after step" in log_of(folder, "structure_only"), "its continuation")


CARDS = """
rule everything:
    default_target: True
    input:
        expand("{form}/{i}", form=["gpus", "gres"], i=range(5)),
rule gpus:
    output:
        "gpus/{i}",
    resources:
        gpu=1,
    shell:
        "mkdir card$CUDA_VISIBLE_DEVICES; sleep 8; rmdir card$CUDA_VISIBLE_DEVICES;"
        " echo $CUDA_VISIBLE_DEVICES > {output}"
use rule gpus as gres with:
    output:
        "gres/{i}",
"""


@pytest.mark.parametrize("cap", [4, 1])
def test_more_jobs_than_cards_never_share_one_and_stay_below_the_cap(
    cluster: slurm.Cluster, tmp_path: Path, cap: int
):
    """Two cards, ten jobs that ask for one in both ways; a job fails where another one is on its card."""
    folder = tmp_path / "cards"
    folder.mkdir()
    (folder / "Snakefile").write_text(CARDS)
    profile = str(ROOT / "workflow/profiles/slurm")
    form = ("--set-resources", "gres:gpu=0", "gres:gres=gpu:1", "gres:card=1")
    options = ("--resources", f"gpu={cap}", f"card={cap}", "--retries", "0")
    wanted = () if cap > 1 else ("--", *(f"gpus/{i}" for i in range(3)))
    run = snakemake(folder, "--workflow-profile", profile, *QUICK, *form, *options, *wanted, presets=())
    queued, running = 0, 0
    try:
        end = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < end:
            states = cluster.ask("squeue", "-ho", "%T").splitlines()
            queued, running = max(queued, len(states)), max(running, states.count("RUNNING"))
            time.sleep(0.5)
        assert run.wait(1) == 0, folder.with_suffix(".out").read_text()[-8000:]
    finally:
        run.kill()
    if cap == 1:
        assert queued == 1
    else:
        assert running == 2  # of more that are in the queue
        assert 2 < queued <= 2 * cap  # each of the two ways has a cap of its own
        for asked in ("gpus", "gres"):
            cards = {(folder / asked / str(i)).read_text().strip() for i in range(5)}
            assert cards == {"0", "1"}
