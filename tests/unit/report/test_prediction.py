"""Predictions scale what was measured, and the schedule knows what waits for what."""

from pathlib import Path

import pytest
import yaml

from castbench.errors import InputError
from castbench.report.prediction import Job, Rates, planned_jobs, planned_sizes, predict_cost, schedule


@pytest.fixture
def config(root: Path) -> dict:
    return yaml.safe_load((root / "config.yaml").read_text()) | {"models": ["structure_only", "cast"]}


def rates(**changes) -> Rates:
    known = {
        "crystals": 100, "device": "a card", "describe": 1.0, "graphs": 0.8, "tokenize": 0.1, "embed": 0.2,
        "start": 5.0, "start_describe": 3.0, "train": {"structure_only": 0.01, "cast": 0.02},
        "pretrain": {"masked_node": 0.03}, "share": 0.5, "n": {"total_energy": 80, "band_gap": 40},
    }  # fmt: skip
    return Rates(**(known | changes))


def test_cards_are_shared_and_inputs_are_waited_for():
    jobs = [
        Job("describe_shard", "texts", 10.0),
        Job("pretrain_model", "masked_node", 20.0, ("texts",), device=True),
        *(Job("train_model", f"m{i}", 30.0, ("masked_node",), device=True) for i in range(3)),
    ]
    assert schedule(jobs, 1, 4) == (
        120.0,
        {"train_model": 90.0, "pretrain_model": 20.0, "describe_shard": 10.0},
    )
    assert schedule(jobs, 2, 4)[0] == 90.0
    assert schedule(jobs, 64, 4)[0] == 60.0


def test_a_job_that_needs_cores_waits_for_them():
    jobs = [Job("describe_shard", "texts", 10.0, cores=1) for _ in range(4)]
    assert schedule(jobs, 1, 2)[0] == 20.0
    assert schedule([Job("build_graphs", "graphs", 7.0, cores=8)], 1, 2)[0] == 7.0  # never waits for ever


def test_work_grows_with_crystals_epochs_and_seeds_and_not_the_start(config: dict, tmp_path: Path):
    config["targets"], config["training"] = (
        ["total_energy"],
        config["training"] | {"epochs": 10, "seeds": [0, 1]},
    )
    sizes = planned_sizes(config, rates(), tmp_path, 1000)
    assert sizes.train == {"total_energy": 800}
    jobs = {(job.stage, job.group): job for job in planned_jobs(config, rates(), sizes, speedup=2.0)}
    assert jobs["train_model", "cast total_energy"].seconds == 5 + 0.02 * 800 * 10 * 2 / 2
    assert "masked_node" in jobs["train_model", "cast total_energy"].needs
    assert jobs["train_model", "structure_only total_energy"].needs == ("graphs",)
    pretraining = config["pretraining"]["masked_node"]["epochs"]
    assert jobs["pretrain_model", "masked_node"].seconds == 5 + 0.03 * 0.5 * 1000 * pretraining / 2


def test_the_papers_data_have_the_papers_numbers(config: dict, tmp_path: Path):
    config["materials"]["source"] = "materials_project"
    sizes = planned_sizes(config, rates(), tmp_path, None)
    assert sizes.crystals == 114398
    assert sizes.train["band_gap"] == 52371


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"targets": ["log_bulk_modulus"]}, "log_bulk_modulus"), ({"models": ["multimat"]}, "multimat")],
)
def test_what_was_not_measured_is_named(config: dict, tmp_path: Path, changes: dict, named: str):
    config |= {"targets": ["total_energy"]} | changes
    with pytest.raises(InputError, match=named):
        planned_jobs(config, rates(), planned_sizes(config, rates(), tmp_path, None), 1.0)


def test_a_run_that_has_not_finished_says_what_it_lacks(root: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"descriptions\.json: missing"):
        predict_cost([root / "config.yaml"], tmp_path, tmp_path / "cost.json")
    assert not list(tmp_path.glob("cost*"))
