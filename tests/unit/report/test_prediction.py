"""Predictions scale what was measured, and the schedule knows what waits for what."""

import copy
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from castbench.errors import InputError
from castbench.materials.splits import write_split
from castbench.provenance import write_json
from castbench.report.prediction import (
    Job,
    planned_disk,
    planned_jobs,
    planned_shape,
    planned_sizes,
    predict_cost,
    schedule,
    settings_of,
    stage_hours,
)
from castbench.report.rates import Rates, Spent, fit, measure, total_bytes
from castbench.report.work import CrystalSize, EncoderShape, embedding_work, step_work

SHAPE = EncoderShape(6, 384, 1536)
SIZE = CrystalSize(nodes=2.0, edges=8.0, tokens_full=100.0, tokens=90.0)


@pytest.fixture
def config(root: Path) -> dict:
    return yaml.safe_load((root / "config.yaml").read_text()) | {"models": ["structure_only", "cast"]}


def rates() -> Rates:
    return Rates(
        crystals=100, device="a card", shape=SHAPE, size=SIZE, neighbours=24,
        describe=1.0, graphs=0.8, tokenize=0.1, embed=1e-9, start=5.0, start_describe=3.0,
        step=0.01, work=1e-9, factor={"structure_only": 1.0, "cast": 1.5, "masked_node": 1.2},
        share=0.5, n={"total_energy": 80, "band_gap": 40}, node_bytes=100.0, token_bytes=10.0,
    )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What is read of a finished run beside its rates: four crystals, of which one has no graph."""
    folder = tmp_path / "results" / "pilot"
    graphs = {"material_id": list("abcd"), "n_nodes": [1, 2, 3, 0], "n_edges": [4, 8, 12, 0]}
    tokens = {"material_id": list("abcd"), "n_tokens_full": [50, 100, 150, 10]}
    for name, table in (("graphs", graphs), ("tokens", tokens)):
        (folder / name).mkdir(parents=True)
        pd.DataFrame(table).to_parquet(folder / name / "index.parquet")
    for target, train in (("total_energy", ["a", "b", "d"]), ("band_gap", ["c"])):
        lists = {"train": train, "validation": [], "test": []}
        write_split(folder / "splits" / f"{target}.json", {"target": target}, lists)
    return folder


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
    # It takes those that there are, for longer.
    assert schedule([Job("build_graphs", "graphs", 7.0, cores=8)], 1, 2)[0] == 28.0
    jobs += [Job("build_graphs", "graphs", 0.5, cores=8)]
    assert schedule(jobs, 1, 1)[0] == 44.0


def test_work_grows_with_crystals_epochs_and_seeds_and_not_the_start(config: dict, results: Path):
    config["targets"], config["training"] = (
        ["total_energy"],
        config["training"] | {"epochs": 10, "seeds": [0, 1]},
    )
    sizes = planned_sizes(config, rates(), results, 1000)
    assert sizes.train == {"total_energy": 800}
    assert sizes.of["total_energy"] == CrystalSize(1.5, 6.0, 75.0, 75.0)
    jobs = {(job.stage, job.group): job for job in planned_jobs(config, rates(), sizes, SHAPE, speedup=2.0)}
    own = step_work(settings_of("cast", config), SHAPE, sizes.of["total_energy"])
    spent = 1.5 * (0.01 * 10 * 800 / 16 + 1e-9 * 10 * 800 * own)
    job = jobs["train_model", "cast total_energy"]
    assert job.seconds == pytest.approx(5 + spent * 2 / 2)
    assert "masked_node" in job.needs
    assert jobs["train_model", "structure_only total_energy"].needs == ("graphs",)
    section = config["pretraining"]["masked_node"]
    own = step_work(settings_of("masked_node", config), SHAPE, sizes.all)
    steps = -(-500 // section["batch_size"])
    spent = 1.2 * section["epochs"] * (0.01 * steps + 1e-9 * 500 * own)
    assert jobs["pretrain_model", "masked_node"].seconds == pytest.approx(5 + spent / 2)
    assert jobs["tokenize_text", "tokens"].seconds == pytest.approx(5 + 0.1 * 1000 * 100)


def test_larger_models_and_longer_texts_cost_more(config: dict, results: Path):
    config["targets"] = ["total_energy"]

    def hours(config: dict) -> dict[str, float]:
        sizes = planned_sizes(config, rates(), results, None)
        jobs = planned_jobs(config, rates(), sizes, planned_shape(config, results), 1.0)
        return {job.group: job.seconds - 5 for job in jobs if job.stage == "train_model"}

    small = hours(config | {"max_tokens": 50})
    long = hours(config)
    assert long["cast total_energy"] > small["cast total_energy"]
    assert long["structure_only total_energy"] == small["structure_only total_energy"]
    wide = copy.deepcopy(config)
    wide["architecture"]["cogn"]["width"] *= 4
    assert hours(wide)["structure_only total_energy"] > 5 * long["structure_only total_energy"]
    deep = copy.deepcopy(config) | {"text_encoder": "matscibert"}
    deep["architecture"]["cross_attention"]["text"] = "lora"
    deep["architecture"]["lora"]["layers"] = "all"
    assert hours(deep)["cast total_energy"] > 10 * long["cast total_energy"]


def test_the_papers_data_have_the_papers_numbers_and_sizes(config: dict, tmp_path: Path):
    config["materials"]["source"] = "materials_project"
    sizes = planned_sizes(config, rates(), tmp_path, None)
    assert sizes.crystals == 114398
    assert sizes.train["band_gap"] == 52371
    assert sizes.all.nodes == 17.28
    assert sizes.all.edges == pytest.approx(17.28 * 4)
    assert sizes.of["log_bulk_modulus"].tokens_full == 250.83
    other = planned_sizes(config | {"targets": ["formation_energy", "band_gap"]}, rates(), tmp_path, None)
    assert (other.crystals, other.train) == (114398, {"formation_energy": 91520, "band_gap": 52371})
    assert 150 < sizes.of["log_bulk_modulus"].tokens < sizes.all.tokens < 512
    # A state of 512 float16 a token, for MatSciBERT twice as much: the larger part of the disk.
    disk = planned_disk(config, rates(), sizes, EncoderShape(12, 768, 3072))
    assert disk == pytest.approx(
        (100 * 17.28 + 10 * 1796.65 + 2 * 768 * sizes.all.tokens) * 114398 / 1e9, rel=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"targets": ["log_bulk_modulus"]}, "log_bulk_modulus"), ({"models": ["multimat"]}, "multimat")],
)
def test_what_was_not_measured_is_named(config: dict, results: Path, changes: dict, named: str):
    config |= {"targets": ["total_energy"]} | changes
    with pytest.raises(InputError, match=named):
        planned_jobs(config, rates(), planned_sizes(config, rates(), results, None), SHAPE, 1.0)


def test_an_encoder_of_unknown_size_is_named(config: dict, results: Path):
    assert planned_shape(config | {"text_encoder": "matscibert"}, results).width == 768
    with pytest.raises(InputError, match=r"someone/bert@1.*prefetch_encoder"):
        planned_shape(config | {"text_encoder": "someone/bert@1"}, results)


def test_steps_and_multiply_adds_are_told_apart():
    made = [
        Spent(0.02 * steps + 3e-9 * work, steps, work) for steps, work in ((10, 1e6), (10, 1e9), (50, 2e8))
    ]
    assert fit(made) == pytest.approx((0.02, 3e-9))
    assert fit([Spent(2.0, 10, 1e9)]) == pytest.approx((0.0, 2e-9))
    step, work = fit([Spent(1.0, 100, 1e6), Spent(0.5, 10, 1e9), Spent(2.0, 210, 1e6)])
    assert step >= 0
    assert work >= 0


def test_the_composition_study_is_refused_in_one_line(root: Path, tmp_path: Path):
    plan = [root / "config.yaml", root / "workflow/presets/perovskite.yaml"]
    with pytest.raises(InputError, match="study compositions"):
        predict_cost(plan, tmp_path, tmp_path / "cost.json")


def test_a_run_that_has_not_finished_says_what_it_lacks(root: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"descriptions\.json: missing"):
        predict_cost([root / "config.yaml"], tmp_path, tmp_path / "cost.json")
    assert not list(tmp_path.glob("cost*"))


@pytest.fixture
def pilot(results: Path) -> Path:
    """The finished run itself: two models, of which one has two seeds, and a pretraining."""
    encoder = results.parent / "encoders" / "bert"
    write_json(encoder / "manifest.json", {"checksum": "c"})
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
    write_json(encoder / "config.json", sizes)
    write_json(results / "descriptions.json", {"n": 4, "seconds": {"total": 60.0}})
    write_json(results / "tokens/manifest.json", {"max_tokens": 120, "encoder": {"checksum": "c"}})
    write_json(results / "tokens/cost.json", {"seconds": 30.0, "cpu_seconds": 99.0})
    write_json(results / "graphs/manifest.json", {"settings": {"neighbours": 24}})
    write_json(results / "graphs/cost.json", {"seconds": 99.0, "cpu_seconds": 12.0})
    write_json(results / "text_states/0/cost.json", {"seconds": 5.0})
    (results / "descriptions").mkdir()
    for shard in ("0", "1"):
        (results / "descriptions" / f"{shard}.parquet").write_bytes(b"x" * 100)
    architecture = {"cogn": {"width": 8, "depth": 1}}
    settings = {"text": "none", "architecture": architecture}
    hardware = {"device": "cpu", "cpu": "a processor", "threads": 2, "gpus": []}
    runs = {
        "runs/total_energy/structure_only/0": {"model": "structure_only", "target": "total_energy"},
        "runs/total_energy/structure_only/1": {"model": "structure_only", "target": "total_energy"},
        "pretrain/masked_node/0": {"objective": "masked_node"},
    }
    for place, named in runs.items():
        record = named | {"status": "finished", "n": {"train": 3}, "epochs": 2, "steps": 10}
        write_json(results / place / "metrics.json", record)
        write_json(results / place / "cost.json", {"seconds": 4.0, "hardware": hardware})
        write_json(results / place / "config.json", settings)
    weights = results / "runs/total_energy/structure_only/checkpoints/1/weights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x" * 10_000)
    for rule, job, seconds in (
        ("train_model", "total_energy.structure_only", 11.0),
        ("describe_shard", "0", 33.0),
        ("describe_shard", "1", 35.0),
    ):
        file = results / "benchmarks" / rule / f"{job}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"s\th:m:s\n{seconds}\t0:00:00\n")
    return results


def test_rates_are_what_was_spent_over_what_was_done(pilot: Path):
    found = measure(pilot)
    size = CrystalSize(nodes=2.0, edges=8.0, tokens_full=100.0, tokens=(50 + 100 + 120) / 3)
    assert (found.size, found.shape, found.neighbours) == (size, SHAPE, 24)
    assert (found.crystals, found.n, found.share) == (4, {"total_energy": 3}, 3 / 4)
    assert found.describe == pytest.approx(60 / 6)  # three crystals of two nodes
    assert found.graphs == pytest.approx(12 / 6)
    assert found.tokenize == pytest.approx(30 / 300)
    assert found.embed == pytest.approx(5 / (3 * embedding_work(0, SHAPE, size)))
    assert found.start == pytest.approx(11 - 2 * 4)
    assert found.start_describe == pytest.approx(((33 - 30) + (35 - 30)) / 2)
    assert found.device == "a processor, 2 thread(s)"
    assert found.run_bytes > 10_000
    assert found.node_bytes == pytest.approx(total_bytes(pilot / "graphs") / 6)
    written = total_bytes(pilot / "descriptions") + total_bytes(pilot / "tokens")
    assert found.token_bytes == pytest.approx(written / 300) and written > 200
    # a and b, which have a graph, of the training crystals of the target
    settings = found.settings["structure_only"]
    own = step_work(settings, SHAPE, CrystalSize(1.5, 6.0, 75.0, 75.0))
    assert found.done == pytest.approx(
        {"structure_only": own, "masked_node": step_work(settings, SHAPE, size)}
    )
    for name, runs in (("structure_only", 2), ("masked_node", 1)):
        # The seconds of its runs, whatever the fit says.
        assert found.seconds(name, 10 * runs, 6 * runs * found.done[name]) == pytest.approx(4 * runs)


def test_a_sample_of_the_papers_data_has_its_share_of_them(config: dict, tmp_path: Path):
    config["materials"] |= {"source": "materials_project", "sample": 11_440}
    sizes = planned_sizes(config, rates(), tmp_path, None)
    assert sizes.crystals == 11_440
    assert sizes.train["band_gap"] == round(52371 * 11_440 / 114398)


def test_more_neighbours_are_more_edges(config: dict, results: Path):
    config["targets"] = ["total_energy"]
    config["graphs"] = config["graphs"] | {"neighbours": 48}
    sizes = planned_sizes(config, rates(), results, None)
    assert (sizes.all.edges, sizes.of["total_energy"].edges) == (16.0, 12.0)


def test_hours_are_of_every_core_and_disk_of_every_run(config: dict, results: Path):
    jobs = [Job("build_graphs", "graphs", 3600.0, cores=8), Job("train_model", "m", 1800.0, device=True)]
    assert stage_hours([*jobs, jobs[0]]) == {
        "build_graphs": {"jobs": 2, "hours": 16.0, "of": "core"},
        "train_model": {"jobs": 1, "hours": 0.5, "of": "device"},
    }
    config["targets"] = ["total_energy"]
    sizes = planned_sizes(config, rates(), results, None)
    measured = rates()
    before = planned_disk(config, measured, sizes, SHAPE)
    measured.run_bytes = 1e9
    runs = (2 + 1) * len(config["training"]["seeds"])  # two models, and the pretraining of one
    assert planned_disk(config, measured, sizes, SHAPE) - before == pytest.approx(runs)


def test_the_longest_job_starts_first():
    jobs = [Job("train_model", str(i), seconds, device=True) for i, seconds in enumerate((1.0, 1.0, 2.0))]
    assert schedule(jobs, 2, 1)[0] == 2.0


def test_the_prediction_adds_up(root: Path, pilot: Path, tmp_path: Path):
    """Of the run itself: one model on one target, whose seeds one job trains."""
    own = {"models": ["structure_only"], "targets": ["total_energy"], "max_tokens": 120}
    own |= {"training": {"epochs": 2, "batch_size": 1, "seeds": [0, 1]}, "text": {"shards": 2}}
    own |= {"architecture": {"cogn": {"width": 8, "depth": 1}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    predict_cost([root / "config.yaml", tmp_path / "own.yaml"], pilot, tmp_path / "cost.json", gpus=[1, 8])
    cost = json.loads((tmp_path / "cost.json").read_text())
    stages = cost["stages"]
    kinds = {"device": "device_hours", "core": "core_hours"}
    for kind, total in kinds.items():
        hours = [stage["hours"] for stage in stages.values() if stage["of"] == kind]
        assert cost[total] == pytest.approx(sum(hours)) and hours
    steps = 2 * 2 * 3  # seeds, epochs, crystals; of the two runs that were measured it was 20
    rate = measure(pilot)
    took = rate.seconds("structure_only", steps, 12 * rate.done["structure_only"]) + rate.start
    assert stages["train_model"] == {"jobs": 1, "hours": pytest.approx(took / 3600), "of": "device"}
    for wall in cost["wall"].values():
        assert wall["hours"] == pytest.approx(sum(wall["critical_path_hours"].values()))
    assert cost["wall"]["1"]["hours"] >= cost["device_hours"]
