"""The paper's preset: what it plans, without a key, a network or a GPU; and what its encoder needs."""

import re
import shutil
from pathlib import Path

import pytest

PRESET = ("--cores", "8", "--configfile", "workflow/presets/paper.yaml")
TARGETS = {"total_energy", "band_gap", "log_shear_modulus", "log_bulk_modulus"}
MODELS = {
    "structure_only",
    "text_only",
    "crysmmnet_frozen",
    "crysmmnet_lora",
    "multimat",
    "cast_scratch",
    "cast",
}
SEEDS = {"0", "1", "2"}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def bare(clone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh clone on a machine that has none of what a run needs."""
    monkeypatch.delenv("MP_API_KEY", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("HF_ENDPOINT", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    folder = clone()
    shutil.rmtree(folder / "results" / "encoders", ignore_errors=True)
    return folder


def outputs(plan: str, rule: str) -> list[list[str]]:
    """The output files of each planned job of a rule."""
    found = re.findall(rf"^(?:local)?rule {rule}:\n(?:    .*\n)*?    output: (.*)$", plan, re.M)
    return [files.split(", ") for files in found]


def test_the_dry_run_plans_the_paper(bare: Path, snakemake):
    ended = snakemake(bare, "-n", *PRESET)
    assert ended.returncode == 0, ended.stdout[-3000:]
    jobs = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", ended.stdout, re.M)}
    assert jobs == {
        "collect_materials": 1,
        "filter_materials": 1,
        "split_materials": 1,
        "describe_shard": 64,
        "gather_descriptions": 1,
        "build_graphs": 1,
        "prefetch_encoder": 1,
        "tokenize_text": 1,
        "embed_text": 1,
        "pretrain_model": 6,
        "train_model": 28,
        "extract_attention": 1,
        "extract_text_attention": 1,
        "probe_text": 6,
        "tabulate_evidence": 1,
        "aggregate_runs": 1,
        "plot_dataset": 1,
        "plot_results": 1,
        "plot_attention": 1,
        "plot_evidence": 1,
        "render_report": 1,
        "all": 1,
        "total": 122,
    }
    train = outputs(ended.stdout, "train_model")
    records = [Path(file) for files in train for file in files if file.endswith("/metrics.json")]
    assert len(train) == 28 and len(records) == 84
    assert {record.parts[-4:-1] for record in records} == {
        (target, model, seed) for target in TARGETS for model in MODELS for seed in SEEDS
    }
    pretrained = {Path(files[0]).parts[-3:-1] for files in outputs(ended.stdout, "pretrain_model")}
    assert pretrained == {(name, seed) for name in ("masked_node", "contrastive") for seed in SEEDS}
    assert "crystals.jsonl" not in ended.stdout, "nothing of the default configuration is read"


def test_without_a_network_one_line_says_where_the_encoder_comes_from(bare: Path, snakemake):
    ended = snakemake(bare, "prefetch_encoder", *PRESET)
    assert ended.returncode != 0
    lines = [line for line in ended.stdout.splitlines() if "ERROR prefetch_encoder" in line]
    assert len(lines) == 1 and "Traceback" not in ended.stdout
    assert "run the rule prefetch_encoder where there is a network, such as a login node" in lines[0]
    assert "copy the folder results/encoders/matscibert here" in lines[0]
    assert not (bare / "results/encoders/matscibert").exists()


def test_a_training_on_several_gpus_and_nodes_asks_for_all_of_them(bare: Path, snakemake):
    overlay = bare / "gpus.yaml"
    overlay.write_text("training: {devices: 4, num_nodes: 2}\n")
    ended = snakemake(bare, "-n", "-p", *PRESET, str(overlay))
    assert ended.returncode == 0, ended.stdout[-3000:]
    for rule in ("train_model", "pretrain_model"):
        resources = re.findall(rf"^rule {rule}:\n(?:    .*\n)*?    resources: (.*)$", ended.stdout, re.M)
        assert resources and all("gpu=8, nodes=2" in found for found in resources)
        # Started once, on the first node, four processes and cards on each.
        several = ("mpi=srun", "tasks_per_node=4", "cpus_per_task=1", "gres=gpu:4")
        assert all(word in found for word in several for found in resources)
    launcher = "srun --overlap --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=4 --cpus-per-task=1 "
    assert f"{launcher}python -m castbench train_model" in ended.stdout
    (states,) = re.findall(r"^rule embed_text:\n(?:    .*\n)*?    resources: (.*)$", ended.stdout, re.M)
    assert "gpu=1" in states
    ended = snakemake(bare, "-n", *PRESET, str(overlay), "--resources", "gpu=4")
    assert ended.returncode != 0
    assert "a training takes 8 GPUs, and the resource gpu is 4; raise it" in ended.stdout
