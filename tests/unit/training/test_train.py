import itertools
import json
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
from castbench.models import REGISTRY, build_model
from castbench.provenance import write_json
from castbench.training.dataset import Crystals
from castbench.training.objectives import Regression
from castbench.training.train import train_model
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
    assert record(tmp_path / "1")["failure"]["step"] == 5


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
