import itertools
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, load_file
from sklearn.metrics import log_loss, roc_auc_score

from castbench.errors import InputError
from castbench.evaluation.metrics import scores
from castbench.materials.splits import checksum, load_split, write_split
from castbench.models import REGISTRY, build_model, build_pretraining
from castbench.provenance import sha256_file, write_json
from castbench.training import train
from castbench.training.checkpoint import encode, read_metadata
from castbench.training.dataset import Crystals
from castbench.training.loop import terminable
from castbench.training.objectives import LOSSES, Regression
from castbench.training.schedule import epoch_batches, rate_factor, seed_step
from castbench.training.train import load_start, train_model
from training_jobs import bytes_of, killed_and_unbroken, run_beside, run_job

STEPS = 16  # of a run: 4 epochs of 27 crystals, 8 a batch


def record(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize("model", REGISTRY)
def test_killed_at_ten_random_points_a_run_ends_with_the_bytes_of_an_unbroken_one(
    pretrained, tmp_path, model
):
    killed, unbroken = killed_and_unbroken(
        lambda folder: pretrained.train(model, folder), tmp_path, "0", STEPS
    )
    assert set(unbroken) == {
        "README.md",
        "config.json",
        "history.csv",
        "metrics.json",
        "model.safetensors",
        "predictions.parquet",
    }
    assert killed == unbroken

    found = json.loads(killed["metrics.json"])
    assert (found["status"], found["steps"], found["epochs"]) == ("finished", STEPS, 4)
    assert found["n"] == {"train": 27, "validation": 6, "test": 6} and found["n_dropped"]["no graph"] == 1
    lora, text = model in ("text_only", "crysmmnet_lora"), model not in ("structure_only", "multimat")
    assert found["text"] == ("lora" if lora else "frozen" if text else "none")
    assert found["n_without_text"] == (1 if text else None)
    assert (found["pretrained"] or {}).get("objective") == {
        "multimat": "contrastive",
        "cast": "masked_node",
    }.get(model)
    assert (found["text_encoder"] is None) == (not text)
    weights = load(killed["model.safetensors"])
    assert sum(value.numel() for value in weights.values()) == found["parameters"]["trainable"]
    assert (found["parameters"]["trainable"] < found["parameters"]["total"]) == lora


def test_sigterm_writes_a_checkpoint_and_asks_for_another_start(data, tmp_path):
    stopped = data.train("cast_scratch", tmp_path / "b" / "cast_scratch")
    assert run_job(data.train("cast_scratch", tmp_path / "a" / "cast_scratch")) == 0
    assert run_job(stopped, stop=6, number=signal.SIGTERM) == 143
    (checkpoint,) = (tmp_path / "b" / "cast_scratch" / "checkpoints" / "0").glob("*.safetensors")
    assert checkpoint.name.split("-")[1] == "000000006"
    assert run_job(stopped, stop=STEPS - 6 + 1) == 0  # takes the other ten steps, else it would be killed
    assert bytes_of(tmp_path / "b" / "cast_scratch" / "0") == bytes_of(tmp_path / "a" / "cast_scratch" / "0")


def test_a_finished_seed_is_not_trained_again(data, tmp_path):
    output, unbroken = tmp_path / "structure_only", tmp_path / "unbroken"
    job = data.train("structure_only", output, seeds=(0, 1, 2))
    assert run_job(data.train("structure_only", unbroken, seeds=(0, 1, 2))) == 0
    assert run_job(job, interval=0, stop=2 * STEPS + 5) == -signal.SIGKILL
    for seed in ("0", "1"):
        shutil.rmtree(output / seed)  # as Snakemake does with the outputs of a failed job
    assert run_job(job, stop=STEPS - 4 + 1) == 0  # the steps that the third seed still had to take
    for seed in ("0", "1", "2"):
        assert bytes_of(output / seed) == bytes_of(unbroken / seed)
    assert record(output / "0")["test"] != record(output / "1")["test"]


@pytest.mark.parametrize("model", ["structure_only", "crysmmnet_frozen"])  # the latter draws dropout
def test_seeds_side_by_side_end_as_one_after_another(data, tmp_path, model):
    apart, together = tmp_path / "a" / model, tmp_path / "b" / model
    assert run_job(data.train(model, apart, seeds=(0, 1, 2))) == 0
    job = data.train(model, together, seeds=(0, 1, 2), seeds_together=True)
    assert run_job(job, stop=10, number=signal.SIGTERM) == 143  # in step 4 of the first, 3 of the others
    assert sorted(path.name for path in (together / "checkpoints").glob("[!.]*")) == ["0", "1", "2"]
    assert not (together / "0").exists()
    assert run_job(job, interval=0, stop=9) == -signal.SIGKILL
    assert run_job(job, interval=0) == 0
    for seed in ("0", "1", "2"):
        assert bytes_of(together / seed) == bytes_of(apart / seed)


def test_a_seed_that_fails_does_not_stop_those_beside_it(data, tmp_path, monkeypatch):
    from castbench.training import loop

    advance = loop.Trainer.advance

    def failing(self, rows):
        loss = advance(self, rows)
        return loss * float("nan") if self.seed == 1 and self.run.step == 6 else loss

    monkeypatch.setattr(loop.Trainer, "advance", failing)
    settings = data.settings("structure_only", seeds_together=True)
    train_model(**arguments(data, "structure_only", tmp_path, seeds=[0, 1, 2], settings=settings))
    assert [record(tmp_path / seed)["status"] for seed in "012"] == ["finished", "failed", "finished"]
    failure = record(tmp_path / "1")["failure"]
    assert (failure["step"], failure["learning_rate"]) == (5, 1e-2 * rate_factor(5, STEPS, 1000, 2))


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with terminable() as terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_checkpoint_falls_back_and_the_run_ends_the_same(data, tmp_path):
    output = tmp_path / "b" / "structure_only"
    assert run_job(data.train("structure_only", tmp_path / "a" / "structure_only")) == 0
    assert run_job(data.train("structure_only", output), interval=0, stop=9) == -signal.SIGKILL
    newest = max((output / "checkpoints" / "0").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    assert run_job([*data.train("structure_only", output), "--log", str(tmp_path / "log")]) == 0
    assert "damaged" in (tmp_path / "log").read_text()
    assert "continuing after step 7 of 16" in (tmp_path / "log").read_text()
    assert bytes_of(output / "0") == bytes_of(tmp_path / "a" / "structure_only" / "0")


def test_changed_settings_start_anew(data, tmp_path):
    output = tmp_path / "b" / "structure_only"
    assert run_job(data.train("structure_only", output), interval=0, stop=9) == -signal.SIGKILL
    changed = data.train("structure_only", output, weight_decay=0.5)
    assert run_job([*changed, "--log", str(tmp_path / "log")]) == 0
    assert "of other settings, data or code" in (tmp_path / "log").read_text()
    again = data.train("structure_only", tmp_path / "a" / "structure_only", weight_decay=0.5)
    assert run_job(again) == 0
    assert bytes_of(output / "0") == bytes_of(tmp_path / "a" / "structure_only" / "0")


def test_settings_that_are_changed_back_continue_where_they_were(data, tmp_path):
    output = tmp_path / "structure_only"
    job, changed = (data.train("structure_only", output, weight_decay=decay) for decay in (0.0, 0.5))
    assert run_job(job, interval=0, stop=9) == -signal.SIGKILL
    assert run_job(changed, interval=0, stop=3) == -signal.SIGKILL
    assert run_job([*job, "--log", str(tmp_path / "log")], stop=STEPS - 8 + 1) == 0
    assert "continuing after step 8 of 16" in (tmp_path / "log").read_text()
    kept = (output / "checkpoints" / "0").glob("*.safetensors")
    assert len({path.name.split("-")[0] for path in kept}) == 1


def test_two_jobs_on_one_run_do_not_disturb_each_other(data, tmp_path):
    job = data.train("structure_only", tmp_path / "b" / "structure_only")
    assert run_beside([job, job], interval=0) == [0, 0]
    assert run_job(data.train("structure_only", tmp_path / "a" / "structure_only")) == 0
    assert bytes_of(tmp_path / "b" / "structure_only" / "0") == bytes_of(
        tmp_path / "a" / "structure_only" / "0"
    )


def test_costs_are_of_the_run_alone(data, tmp_path, monkeypatch):
    """Not of the seeds beside it, nor of a job that writes a finished run once more; of a failed run too."""
    from castbench.training import loop

    advance = loop.Trainer.advance

    def slow(self, rows):
        time.sleep(0.02)
        loss = advance(self, rows)
        return loss * float("nan") if self.seed == 1 and self.run.step == 6 else loss

    def costs():
        return [json.loads((tmp_path / seed / "cost.json").read_text()) for seed in "012"]

    monkeypatch.setattr(loop.Trainer, "advance", slow)
    settings = data.settings("structure_only", seeds_together=True)
    given = arguments(data, "structure_only", tmp_path, seeds=[0, 1, 2], settings=settings)
    since = time.monotonic()
    train_model(**given)
    whole, found = time.monotonic() - since, costs()
    assert sum(cost["seconds"] for cost in found) < whole
    assert all(cost["seconds"] > 0.02 * 8 and cost["samples_per_second"] < 27 / 0.08 for cost in found)
    monkeypatch.setattr(loop, "peak_memory", lambda fabric: 1.0)
    monkeypatch.setattr(loop, "describe_session", lambda fabric: {"cpu": "another"})
    train_model(**given)
    again = costs()
    assert [again[0], again[2]] == [found[0], found[2]]


def test_costs_add_up_over_checkpoints(data, tmp_path, monkeypatch):
    """Seconds once, and the largest memory of all."""
    from castbench.training import loop

    peaks = itertools.chain([70.0], itertools.repeat(50.0))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "peak_memory", lambda fabric: next(peaks))
    since = time.monotonic()
    train_model(**arguments(data, "structure_only", tmp_path))
    whole, cost = time.monotonic() - since, json.loads((tmp_path / "0" / "cost.json").read_text())
    assert 0 < cost["seconds"] < whole and cost["peak_memory_mb"] == 70.0


def test_a_loss_that_is_not_finite_fails_the_run_and_not_the_job(data, tmp_path):
    output = tmp_path / "structure_only"
    log = ["--log", str(tmp_path / "log")]
    assert run_job([*data.train("structure_only", output, seeds=(0, 1), learning_rate=1e38), *log]) == 0
    found = record(output / "1")
    assert found["status"] == "failed" and found["test"] is None
    assert found["reason"] == "training loss is not finite at step 1"
    assert found["failure"]["step"] == 1 and found["failure"]["learning_rate"] > 1e37
    assert 0 < len(found["failure"]["material_ids"]) <= 8
    assert set(found["failure"]["material_ids"]) <= {f"m-{i}" for i in range(28)}
    line = f"learning rate {found['failure']['learning_rate']:.3g}; the run stops. Its batch: "
    assert line + ", ".join(found["failure"]["material_ids"]) in (tmp_path / "log").read_text()
    assert len(pd.read_parquet(output / "1" / "predictions.parquet")) == 0
    assert load_file(output / "1" / "model.safetensors") == {}
    assert list(pd.read_csv(output / "1" / "history.csv").columns) == [
        "epoch", "step", "learning_rate", "train_loss", "validation_loss", "validation_mae",
    ]  # fmt: skip


def test_a_validation_that_is_not_finite_fails_the_run_and_not_the_job(data, tmp_path, monkeypatch):
    losses = itertools.cycle([1.0, math.inf])
    monkeypatch.setattr(
        Regression, "validate", lambda *_: {"validation_loss": next(losses), "validation_mae": 1.0}
    )
    train_model(**arguments(data, "structure_only", tmp_path, seeds=[0, 1]))
    for seed in "01":
        found, history = record(tmp_path / seed), pd.read_csv(tmp_path / seed / "history.csv")
        assert (found["status"], found["test"], found["failure"]["step"]) == ("failed", None, 7)
        assert found["reason"] == "validation loss is not finite at step 7"
        assert found["failure"]["learning_rate"] == 1e-2 * rate_factor(7, STEPS, 1000, 2)
        assert found["failure"]["material_ids"] == [f"m-{i}" for i in range(28, 34)]
        assert history["epoch"].tolist() == [0] and found["epochs"] == 1  # what it had come to


def test_weights_that_are_not_finite_fail_the_run_and_not_the_job(data, tmp_path, monkeypatch):
    """Of a last step without validation no loss tells."""
    from castbench.training import loop

    descend = loop.Trainer.descend

    def overflowing(self, loss):
        descend(self, loss * float("inf") if self.run.step + 1 == self.run.total else loss)
        return loss.detach()

    monkeypatch.setattr(loop.Trainer, "descend", overflowing)
    settings = data.settings("structure_only", selection="last")
    split, lists = tmp_path / "split.json", load_split(data.root / "splits" / "total_energy.json")
    write_split(split, {"reason": None}, {"train": lists["train"], "validation": [], "test": lists["test"]})
    chosen = {"settings": settings, "seeds": [0, 1], "split": split}
    train_model(**arguments(data, "structure_only", tmp_path / "runs", **chosen))
    for seed in "01":
        found = record(tmp_path / "runs" / seed)
        assert (found["status"], found["failure"]["step"]) == ("failed", found["steps"] - 1)
        assert found["reason"].startswith("a weight is not finite at step") and found["test"] is None
        assert load_file(tmp_path / "runs" / seed / "model.safetensors") == {}


def test_a_prediction_that_is_not_finite_fails_the_run_and_not_the_job(data, tmp_path, monkeypatch):
    from castbench.training import objectives

    predict = objectives.Regression.predict

    def lost(self, network, rows):
        found = predict(self, network, rows)
        if not torch.equal(rows, self.validation):
            found[2] = np.nan
        return found

    monkeypatch.setattr(objectives.Regression, "predict", lost)
    train_model(**arguments(data, "structure_only", tmp_path, seeds=[0, 1]))
    for seed in "01":
        found = record(tmp_path / seed)
        assert found["status"] == "failed" and found["test"] is None and found["validation"] is None
        (crystal,) = found["failure"]["material_ids"]
        assert found["reason"] == f"predictions are not finite, 1 in all, the first that of {crystal}"
        assert len(pd.read_parquet(tmp_path / seed / "predictions.parquet")) == 0
        assert len(pd.read_csv(tmp_path / seed / "history.csv")) == 4
        assert json.loads((tmp_path / seed / "cost.json").read_text())["seconds"] > 0


def arguments(data, model, output, **changes):
    """Arguments of train_model, called in this process."""
    given = {
        "settings": data.settings(model),
        "model": model,
        "target": "total_energy",
        "seeds": [0],
        "materials": data.root / "materials.parquet",
        "split": data.root / "splits" / "total_energy.json",
        **data.caches(model),
        "pretrained": [],
        "output": output,
        "threads": 1,
    }
    return given | changes


@pytest.mark.parametrize("longest", [None, 0.1], ids=["at_most_1", "at_most_0.1"])
def test_a_run_takes_the_steps_of_a_plain_loop(data, tmp_path, longest):
    """Rates, decay, clipping, losses, the order of crystals and dropout, written out."""
    model, steps = "crysmmnet_lora", 20
    changes = {"epochs": 5, "lora_learning_rate": 2e-3, "weight_decay": 0.3, "selection": "last"}
    settings = data.settings(model, **changes, **({"max_gradient_norm": longest} if longest else {}))
    train_model(**arguments(data, model, tmp_path, seeds=[3], settings=settings))

    torch.manual_seed(3)
    network = build_model(model, settings["architecture"], data.root / "encoder")
    paths = {name: path for name, path in data.caches(model).items() if name != "encoder"}
    crystals = Crystals(network, **paths, device=torch.device("cpu"))
    rows, _ = crystals.rows(load_split(data.root / "splits" / "total_energy.json")["train"])
    values = pq.read_table(data.root / "materials.parquet")["energy_per_atom"].to_numpy()
    targets = torch.from_numpy((values - values[rows].mean()) / values[rows].std()).float()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    lora = [p for name, p in trained.items() if ".lora_" in name]
    matrices = [p for name, p in trained.items() if ".lora_" not in name and p.ndim > 1]
    others = [p for name, p in trained.items() if ".lora_" not in name and p.ndim == 1]
    groups = ((matrices, 1e-2, 0.3), (others, 1e-2, 0.0), (lora, 2e-3, 0.0))
    optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": decay} for ps, _, decay in groups])
    network.train()
    losses, norms = [], []
    for step, batch in enumerate(itertools.chain(*(epoch_batches(rows, 8, 3, epoch) for epoch in range(5)))):
        for group, (_, peak, _) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = peak * rate_factor(step, steps, 1000, 2)
        seed_step(torch.device("cpu"), 3, "dropout", step)
        loss = (network(crystals.batch(batch)) - targets[batch]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), longest or 1.0)))
        optimizer.step()
        losses.append(loss.item())
    assert max(norms) > 1.0
    history = pd.read_csv(tmp_path / "3" / "history.csv")
    assert history["train_loss"].tolist() == pytest.approx(np.reshape(losses, (5, 4)).mean(1), rel=1e-4)
    found = load_file(tmp_path / "3" / "model.safetensors")
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_a_network_starts_from_the_pretraining_of_its_own_seed(data, tmp_path):
    architecture = data.settings("multimat")["architecture"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = build_pretraining("contrastive", architecture, data.root / "encoder").trained_state()
        write_json(tmp_path / str(seed) / "metrics.json", {"status": "finished", "objective": "contrastive"})
        (tmp_path / str(seed) / "model.safetensors").write_bytes(encode(weights, {}))
    network = build_model("multimat", architecture, None)
    source, lack = load_start(network, "multimat", 1, [tmp_path / "0", tmp_path / "1"])
    checksum = sha256_file(tmp_path / "1" / "model.safetensors")
    assert (source, lack) == ({"objective": "contrastive", "seed": 1, "sha256": checksum}, None)
    for name, value in network.structure.named_parameters(prefix="structure"):
        assert torch.equal(value, weights[name])


def test_predictions_are_those_of_the_saved_weights_and_the_record_is_their_error(data, tmp_path):
    train_model(**arguments(data, "cast_scratch", tmp_path))
    table, found = pd.read_parquet(tmp_path / "0" / "predictions.parquet"), record(tmp_path / "0")
    for part in ("validation", "test"):
        rows = table[table["split"] == part]
        assert found[part] == scores(rows["y_true"], rows["y_pred"])
    history = pd.read_csv(tmp_path / "0" / "history.csv", float_precision="round_trip")
    assert history["validation_mae"].idxmin() == found["best_epoch"]
    assert found["validation"]["mae"] == history["validation_mae"].min()

    network = build_model(
        "cast_scratch", data.settings("cast_scratch")["architecture"], data.root / "encoder"
    )
    network.load_trained_state(load_file(tmp_path / "0" / "model.safetensors"))
    paths = {name: path for name, path in data.caches("cast_scratch").items() if name != "encoder"}
    crystals = Crystals(network, **paths, device=torch.device("cpu"))
    rows, _ = crystals.rows(table.loc[table["split"] == "test", "material_id"])
    with torch.inference_mode():
        predicted = (
            network.eval()(crystals.batch(rows)).double().numpy() * found["target_std"] + found["target_mean"]
        )
    np.testing.assert_array_equal(predicted, table.loc[table["split"] == "test", "y_pred"])


def test_a_record_says_what_was_read_and_the_weights_hold_the_settings(data, tmp_path):
    settings = data.settings("cast_scratch", epochs=1)
    train_model(**arguments(data, "cast_scratch", tmp_path, settings=settings))
    found, config = record(tmp_path / "0"), json.loads((tmp_path / "0" / "config.json").read_text())
    caches = data.caches("cast_scratch")
    read = {name: sha256_file(caches[name] / "manifest.json") for name in ("graphs", "tokens", "states")}
    read["split"] = load_split(data.root / "splits" / "total_energy.json")["checksum"]
    assert found["inputs"] == read
    encoder = json.loads((data.root / "encoder" / "manifest.json").read_text())
    assert found["text_encoder"] == {name: encoder[name] for name in ("id", "revision", "checksum")}
    assert config == settings | {"model": "cast_scratch", "target": "total_energy", "seed": 0}
    assert read_metadata(tmp_path / "0" / "model.safetensors") == config
    cost = json.loads((tmp_path / "0" / "cost.json").read_text())
    assert cost["peak_memory_mb"] > 50 and cost["hardware"]["cores"] > 0
    assert (cost["hardware"]["device"], cost["hardware"]["threads"]) == ("cpu", 1)


def test_a_part_of_which_no_crystal_is_left_skips_the_run(data, tmp_path):
    lists = {"train": ["m-1", "m-2"], "validation": ["m-7"], "test": ["m-3"]}  # 7 has no graph
    write_split(tmp_path / "s.json", {"reason": None}, lists)
    train_model(**arguments(data, "structure_only", tmp_path, split=tmp_path / "s.json"))
    found = record(tmp_path / "0")
    assert (found["status"], found["reason"]) == ("skipped", "no crystal is left in validation")


def test_caches_are_staged_where_that_is_asked_for(data, tmp_path, monkeypatch):
    staged = {data.caches("cast_scratch")[name]: tmp_path / name for name in ("graphs", "tokens", "states")}
    for cache, copy in staged.items():
        shutil.copytree(cache, copy)
    monkeypatch.setattr(train, "stage_cache", lambda cache: staged.pop(cache))
    train_model(**arguments(data, "cast_scratch", tmp_path / "runs", stage=1))
    assert record(tmp_path / "runs" / "0")["status"] == "finished" and not staged


def test_all_values_equal_is_no_division_by_zero(data):
    network = build_model("structure_only", data.settings("structure_only")["architecture"], None)
    paths = {name: path for name, path in data.caches("structure_only").items() if name != "encoder"}
    crystals = Crystals(network, **paths, device=torch.device("cpu"))
    rows = torch.arange(3)
    task = Regression(crystals, np.full(40, 2.0), rows, rows, {"batch_size": 2, "loss": "l1"})
    assert (task.mean, task.std) == (2.0, 1.0) and not task.targets.any()


@pytest.mark.parametrize(
    ("loss", "expected"), [("l1", (2.5 + 0.5) / 2), ("mse", (6.25 + 0.25) / 2), ("huber", (2.0 + 0.125) / 2)]
)
def test_losses_by_hand(loss, expected):
    """Of predictions 1.5 for -1 and 1; Huber's is quadratic to 1."""
    assert float(LOSSES[loss](torch.tensor([1.5, 1.5]), torch.tensor([-1.0, 1.0]))) == expected


def test_standardisation_is_by_the_training_part_and_errors_are_in_the_unit(data):
    values = np.full(40, np.nan)
    values[:6] = [1.0, 3.0, 100.0, 200.0, np.nan, np.nan]
    network = build_model("structure_only", data.settings("structure_only")["architecture"], None)
    paths = {name: path for name, path in data.caches("structure_only").items() if name != "encoder"}
    crystals = Crystals(network, **paths, device=torch.device("cpu"))
    task = Regression(
        crystals, values, torch.tensor([0, 1]), torch.tensor([2, 3]), {"batch_size": 2, "loss": "mse"}
    )
    assert (task.mean, task.std) == (2.0, 1.0)
    assert task.targets[:2].tolist() == [-1.0, 1.0]

    class Constant(torch.nn.Module):
        def forward(self, batch):
            return torch.full((batch.n,), 1.5)

    validation = task.validate(Constant())
    assert validation["validation_mae"] == pytest.approx((96.5 + 196.5) / 2)
    assert validation["validation_loss"] == pytest.approx((96.5**2 + 196.5**2) / 2)
    assert float(task.loss(Constant(), torch.tensor([0, 1]), 0)) == pytest.approx((2.5**2 + 0.5**2) / 2)


def without_validation(data, folder):
    """The split of the data set with its validation crystals in train."""
    lists = json.loads((data.root / "splits" / "total_energy.json").read_text())
    lists["train"], lists["validation"] = sorted(lists["train"] + lists["validation"]), []
    write_json(folder / "s.json", lists | {"checksum": checksum(lists)})
    return folder / "s.json"


def test_the_last_epoch_is_kept_where_nothing_is_set_aside_for_validation(data, tmp_path):
    split = without_validation(data, tmp_path)
    linear = {"schedule": "linear", "final_learning_rate": 1e-3, "max_gradient_norm": None}
    settings = data.settings("structure_only", selection="last", warmup_steps=0, **linear)
    train_model(**arguments(data, "structure_only", tmp_path / "run", split=split, settings=settings))
    found, history = record(tmp_path / "run" / "0"), pd.read_csv(tmp_path / "run" / "0" / "history.csv")
    assert found["n"] == {"train": 33, "validation": 0, "test": 6}
    assert (found["best_epoch"], found["validation"]) == (3, None)
    assert found["test"]["mae"] > 0
    assert history["validation_mae"].isna().all()
    assert history["learning_rate"].tolist() == pytest.approx(
        [1e-2 - (1e-2 - 1e-3) * (5 * epoch - 1) / 20 for epoch in (1, 2, 3, 4)]
    )
    assert set(pd.read_parquet(tmp_path / "run" / "0" / "predictions.parquet")["split"]) == {"test"}


def test_the_last_epoch_is_kept_whatever_validation_says(data, tmp_path, monkeypatch):
    epochs = itertools.count()
    monkeypatch.setattr(Regression, "validate", lambda *_: dict.fromkeys(Regression.columns, next(epochs)))
    for selection in ("best", "last"):
        settings = data.settings("structure_only", selection=selection)
        train_model(**arguments(data, "structure_only", tmp_path / selection, settings=settings))
    best, last = record(tmp_path / "best" / "0"), record(tmp_path / "last" / "0")
    assert (best["best_epoch"], last["best_epoch"]) == (0, 3)
    assert best["test"]["mae"] != last["test"]["mae"]


def test_selection_by_validation_needs_some(data, tmp_path):
    with pytest.raises(InputError, match="sets nothing aside for validation"):
        train_model(**arguments(data, "structure_only", tmp_path, split=without_validation(data, tmp_path)))


def test_a_classification_predicts_probabilities(data, tmp_path):
    ids = pq.read_table(data.root / "materials.parquet")["material_id"].to_pylist()
    classes = [float(i % 3 == 0) for i in range(len(ids))]
    table = pa.table({"material_id": ids, "matbench_mp_is_metal": classes})
    pq.write_table(table, tmp_path / "materials.parquet")
    changes = {"target": "matbench_mp_is_metal.fold_2", "materials": tmp_path / "materials.parquet"}
    train_model(**arguments(data, "structure_only", tmp_path, **changes))
    found, rows = record(tmp_path / "0"), pd.read_parquet(tmp_path / "0" / "predictions.parquet")
    assert rows["y_pred"].between(0, 1).all() and set(rows["y_true"]) == {0.0, 1.0}
    tested = rows[rows["split"] == "test"]
    assert found["test"]["roc_auc"] == roc_auc_score(tested["y_true"], tested["y_pred"])
    assert found["test"]["accuracy"] == ((tested["y_pred"] > 0.5) == (tested["y_true"] > 0.5)).mean()
    history = pd.read_csv(tmp_path / "0" / "history.csv")
    assert history["validation_loss"].idxmin() == found["best_epoch"]
    chosen = rows[rows["split"] == "validation"]
    assert history["validation_loss"].min() == pytest.approx(log_loss(chosen["y_true"], chosen["y_pred"]))


def test_a_target_with_too_few_crystals_is_skipped(data, tmp_path):
    lists, reason = {"train": ["m-1"], "validation": [], "test": []}, "1 crystals, and 20 are the fewest"
    write_split(tmp_path / "s.json", {"target": "total_energy"}, lists, reason)
    train_model(**arguments(data, "structure_only", tmp_path / "run", split=tmp_path / "s.json"))
    found = record(tmp_path / "run" / "0")
    assert (found["status"], found["reason"]) == ("skipped", reason)
    assert len(pd.read_parquet(tmp_path / "run" / "0" / "predictions.parquet")) == 0
    assert (tmp_path / "run" / "0" / "cost.json").read_text() == "{}\n"


def test_a_missing_target_is_dropped_and_counted(data, tmp_path, caplog):
    table = pq.read_table(data.root / "materials.parquet").to_pydict()
    table["energy_per_atom"][3] = None
    pq.write_table(pa.table(table), tmp_path / "materials.parquet")
    train_model(**arguments(data, "structure_only", tmp_path, materials=tmp_path / "materials.parquet"))
    found = record(tmp_path / "0")
    assert found["n"]["train"] == 26 and found["n_dropped"] == {"no graph": 1, "no target": 1}
    assert "total_energy: 1 crystals dropped, no target" in caplog.text


def test_materials_that_are_not_those_of_the_caches_are_refused(data, tmp_path):
    pq.write_table(pa.table({"material_id": ["x"], "energy_per_atom": [1.0]}), tmp_path / "materials.parquet")
    with pytest.raises(InputError, match="other crystals than the graphs have"):
        train_model(**arguments(data, "structure_only", tmp_path, materials=tmp_path / "materials.parquet"))


def test_a_pretraining_that_is_missing_is_refused_and_one_that_failed_skips_the_run(data, tmp_path):
    with pytest.raises(InputError, match="multimat, seed 0: no pretraining run of this seed"):
        train_model(**arguments(data, "multimat", tmp_path, pretrained=[tmp_path / "1"]))
    failed = {
        "status": "failed",
        "reason": "training loss is not finite at step 3",
        "objective": "contrastive",
    }
    write_json(tmp_path / "pretrain" / "0" / "metrics.json", failed)
    train_model(**arguments(data, "multimat", tmp_path / "run", pretrained=[tmp_path / "pretrain" / "0"]))
    assert record(tmp_path / "run" / "0")["status"] == "skipped"
    assert (
        "pretraining contrastive, seed 0, is failed: training loss"
        in record(tmp_path / "run" / "0")["reason"]
    )
