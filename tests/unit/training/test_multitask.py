"""Losses by hand, missing values, task weights, and runs that stop early and resume to the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from torch import nn
from torch.nn import functional

from castbench.compositions.magpie import featurize_compositions
from castbench.config import COMPOSITION_MODELS
from castbench.errors import InputError
from castbench.evaluation.compositions import number_table, read_runs
from castbench.models import COMPOSITION_REGISTRY, build_composition_model
from castbench.models.composition import Compositions
from castbench.training.baselines import fit_baseline
from castbench.training.compositions import read_compositions, train_compositions
from castbench.training.loop import Trainer
from castbench.training.multitask import MultiTask, class_weights, focal_loss
from composition_data import ARCHITECTURE, TRAINING, aggregated, rows, split
from composition_data import composition_settings as settings
from training_jobs import killed_and_unbroken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = rows()
    own[4]["gap"] = ""
    folder = aggregated(tmp_path_factory.mktemp("data"), own)
    split(folder)
    return folder


def train(folder: Path, output: Path, seeds: list[int] | None = None, **own: Any) -> dict[str, Any]:
    train_compositions(
        settings(**own), "edm_transformer", seeds or [0], folder / "compositions.parquet",
        folder / "split.json", output, 1,
    )  # fmt: skip
    return json.loads((output / "0" / "metrics.json").read_text())


def objective(folder: Path, **own: Any) -> MultiTask:
    chosen = settings(**own)
    data = read_compositions(chosen, folder / "compositions.parquet", folder / "split.json")
    source = Compositions(
        torch.from_numpy(data.numbers), torch.from_numpy(data.fractions), torch.device("cpu")
    )
    parts = {part: torch.from_numpy(found) for part, found in data.rows.items()}
    return MultiTask(source, data.values, ["stability"], parts, chosen["training"], chosen["loss"])


def test_focal_loss_by_hand():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    p = torch.sigmoid(logits)
    p_t, alpha = torch.where(labels > 0.5, p, 1 - p), torch.tensor([0.25, 0.25, 0.75])
    expected = (-alpha * (1 - p_t) ** 2 * p_t.log()).mean()
    assert focal_loss(logits, labels, (0.75, 0.25)) == pytest.approx(float(expected))


def test_focal_loss_without_focus_is_the_cross_entropy():
    logits, labels = torch.randn(20), torch.randint(2, (20,)).float()
    expected = functional.binary_cross_entropy_with_logits(logits, labels)
    assert focal_loss(logits, labels, (1.0, 1.0), gamma=0.0) == pytest.approx(float(expected))
    assert focal_loss(torch.tensor([-200.0]), torch.ones(1), (1.0, 1.0)) == pytest.approx(200.0)


def test_class_weights_by_kind():
    labels = np.array([0, 0, 0, 1.0])
    assert class_weights("cross_entropy", labels) == ((1.0, 1.0), 0.0)
    assert class_weights("report", labels) == ((0.75, 0.25), 2.0)
    (alpha_0, alpha_1), gamma = class_weights("inverse_frequency", labels)
    assert (alpha_0, alpha_1, gamma) == (0.25, 0.75, 2.0)  # equal weight of both classes: 3 * 0.25 = 1 * 0.75


def test_standardisation_is_that_of_training_alone(folder: Path):
    task = objective(folder)
    known = task.truth["band_gap"][task.rows.numpy()]
    assert task.scale["band_gap"] == (pytest.approx(np.nanmean(known)), pytest.approx(np.nanstd(known)))
    assert task.scale["stability"] == (0.0, 1.0)


def test_a_missing_value_takes_no_part_in_its_loss(folder: Path):
    task = objective(folder)
    missing = np.flatnonzero(np.isnan(task.truth["band_gap"]))
    assert len(missing) == 1
    rows_ = torch.tensor([int(missing[0]), int(task.rows[0])])
    output = {"band_gap": torch.tensor([5.0, 0.3]), "stability": torch.zeros(2)}
    known = functional.smooth_l1_loss(torch.tensor([0.3]), task.targets["band_gap"][rows_[1:]], beta=0.5)
    assert task.task_losses(output, rows_)["band_gap"] == pytest.approx(float(known))
    alone = {target: values[:1] for target, values in output.items()}
    assert task.task_losses(alone, rows_[:1])["band_gap"] == 0


def test_learned_weights_are_kendalls(folder: Path):
    task = objective(folder, task_weights="learned")
    torch.manual_seed(0)
    network = build_composition_model(
        "edm_transformer", ARCHITECTURE, ["band_gap", "stability"], "learned"
    ).eval()
    network.log_variances.data = torch.tensor([0.4, -0.2])
    rows_ = task.rows[:8]
    with torch.no_grad():
        losses = task.task_losses(network(task.compositions.batch(rows_)), rows_)
    expected = 0.5 * np.exp(-0.4) * losses["band_gap"] + 0.2 + np.exp(0.2) * losses["stability"] - 0.1
    assert task.loss(network, rows_, 0).item() == pytest.approx(float(expected), rel=1e-5)


def test_a_run_has_scores_of_every_target_and_says_how_it_weighed(folder: Path, tmp_path: Path):
    record = train(folder, tmp_path)
    assert record["status"] == "finished"
    assert set(record["scores"]) == {"band_gap", "stability"}
    assert record["scores"]["band_gap"]["test"]["mae"] > 0
    assert 0 < record["scores"]["stability"]["threshold"] < 1
    assert record["class_weights"]["stability"]["gamma"] == 2.0
    history = pd.read_csv(tmp_path / "0" / "history.csv")
    assert len(history) == 4
    assert {"train_band_gap_r2", "validation_band_gap_rmse"} <= set(history.columns)
    predictions = pd.read_parquet(tmp_path / "0" / "predictions.parquet")
    assert predictions["stability_pred"].between(0, 1).all()
    assert sorted(set(predictions["split"])) == ["test", "validation"]


def test_the_encoder_learns_at_its_own_rate(folder: Path, tmp_path: Path):
    from lightning_fabric import Fabric

    task = objective(folder)
    network = build_composition_model("edm_transformer", ARCHITECTURE, ["band_gap", "stability"])
    trainer = Trainer(network, task, TRAINING, 1, 0, Fabric(accelerator="cpu"), tmp_path, "key")
    peaks = {group["peak"] for group in trainer.optimizer.param_groups}
    assert peaks == {1e-3, 1e-4}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        [*network.parameters()]
    )


def test_a_run_stops_when_validation_no_longer_improves(folder: Path, tmp_path: Path):
    record = train(folder, tmp_path, epochs=60, patience=2, learning_rate=0.05, encoder_learning_rate=0.05)
    assert record["epochs"] < 60
    assert record["epochs"] == record["best_epoch"] + 3
    again = train(folder, tmp_path, epochs=60, patience=2, learning_rate=0.05, encoder_learning_rate=0.05)
    assert again == record  # from its last checkpoint, without another step


def test_a_prediction_that_is_not_finite_fails_the_run(folder: Path, tmp_path: Path, monkeypatch):
    predict = MultiTask.predict

    def lost(self: MultiTask, network: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        found = predict(self, network, rows)
        if len(rows) and not torch.equal(rows, self.validation) and not torch.equal(rows, self.subset):
            found["stability"][0] = torch.nan
        return found

    monkeypatch.setattr(MultiTask, "predict", lost)
    record = train(folder, tmp_path, epochs=1)
    (formula,) = record["failure"]["material_ids"]
    assert record["status"] == "failed" and "scores" not in record
    assert record["reason"] == f"predictions are not finite, 1 in all, the first that of {formula}"
    assert pd.read_parquet(tmp_path / "0" / "predictions.parquet").empty


def test_a_failed_run_says_where_and_enters_no_mean(folder: Path, tmp_path: Path):
    runs = tmp_path / "composition_runs" / "edm_transformer"
    good = train(folder, runs)
    train(folder, tmp_path / "failed", learning_rate=1e38, encoder_learning_rate=1e38)
    shutil.move(tmp_path / "failed" / "0", runs / "1")
    found = json.loads((runs / "1" / "metrics.json").read_text())
    assert found["status"] == "failed" and "is not finite at step" in found["reason"]
    assert found["failure"]["learning_rate"] > 1e36 and 0 < len(found["failure"]["material_ids"]) <= 8
    assert len(pd.read_parquet(runs / "1" / "predictions.parquet")) == 0
    chosen = settings() | {"models": ["edm_transformer"], "structure_models": [], "seeds": [0, 1]}
    (row,) = (
        number_table(read_runs(chosen, tmp_path), chosen)
        .query("model == 'edm_transformer'")
        .to_dict("records")
    )
    assert (row["finished"], row["expected"]) == (1, 2)
    assert row["mae_mean"] == good["scores"]["band_gap"]["test"]["mae"]


def test_the_same_seed_gives_the_same_bits(folder: Path, tmp_path: Path):
    train(folder, tmp_path / "a", seeds=[1, 0])
    train(folder, tmp_path / "b", seeds=[0])
    for name in ("metrics.json", "predictions.parquet", "model.safetensors", "history.csv"):
        assert (tmp_path / "a" / "0" / name).read_bytes() == (tmp_path / "b" / "0" / name).read_bytes()
    first, second = (tmp_path / "a" / seed / "model.safetensors" for seed in ("0", "1"))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("model", COMPOSITION_REGISTRY)
def test_killed_at_ten_random_points_a_run_ends_with_the_bytes_of_an_unbroken_one(
    folder: Path, tmp_path: Path, model: str
):
    loss = COMPOSITION_MODELS[model][1]

    def command(output: Path) -> list[str]:
        return [
            "train_compositions", "--model", model, "--settings", json.dumps(settings(loss)), "--seeds", "0",
            "--compositions", f"{folder}/compositions.parquet", "--split", f"{folder}/split.json",
            "--output", str(output), "--threads", "1",
        ]  # fmt: skip

    killed, unbroken = killed_and_unbroken(command, tmp_path, "0", 12)
    assert len(unbroken) == 6 and killed == unbroken
    found = json.loads(killed["metrics.json"])
    assert (found["status"], found["steps"]) == ("finished", 12)


def test_a_formula_with_more_elements_than_slots_is_refused(folder: Path):
    with pytest.raises(InputError, match=r"max_elements is 2.*run collect_compositions again"):
        read_compositions(
            settings() | {"max_elements": 2}, folder / "compositions.parquet", folder / "split.json"
        )


@pytest.mark.parametrize("model", ["baseline", "random_forest"])
def test_baselines_have_the_files_of_a_run(folder: Path, tmp_path: Path, model: str):
    featurize_compositions(folder / "compositions.parquet", tmp_path / "magpie.parquet")
    fit_baseline(
        settings(), model, [0, 1], folder / "compositions.parquet", folder / "split.json",
        tmp_path / "magpie.parquet", tmp_path, 1,
    )  # fmt: skip
    records = [json.loads((tmp_path / seed / "metrics.json").read_text()) for seed in ("0", "1")]
    assert all(record["status"] == "finished" for record in records)
    predictions = pd.read_parquet(tmp_path / "0" / "predictions.parquet")
    if model == "baseline":
        data = read_compositions(settings(), folder / "compositions.parquet", folder / "split.json")
        mean = np.nanmean(data.values["band_gap"][data.rows["train"]])  # noqa: PD011
        assert predictions["band_gap_pred"].to_numpy() == pytest.approx(mean)
        assert records[0]["scores"]["stability"]["test"]["at_half"]["recall"]["positive"] == 0
        assert records[0]["scores"] == records[1]["scores"]
    else:
        assert records[0]["scores"] != records[1]["scores"]


def test_a_forest_is_fitted_to_the_training_formulas_that_have_a_value(tmp_path: Path):
    folder = aggregated(tmp_path, rows())
    split(folder)
    data = read_compositions(settings(), folder / "compositions.parquet", folder / "split.json")
    missing = data.formulas[data.rows["train"][0]]
    table = pd.read_parquet(folder / "compositions.parquet")
    table.loc[table["formula"] == missing, "band_gap"] = np.nan
    table.to_parquet(folder / "compositions.parquet")
    featurize_compositions(folder / "compositions.parquet", tmp_path / "magpie.parquet")
    fit_baseline(
        settings(), "random_forest", [3], folder / "compositions.parquet", folder / "split.json",
        tmp_path / "magpie.parquet", tmp_path, 1,
    )  # fmt: skip
    x = pd.read_parquet(tmp_path / "magpie.parquet").drop(columns="formula").to_numpy()
    train, found = data.rows["train"], pd.read_parquet(tmp_path / "3" / "predictions.parquet")
    gap = RandomForestRegressor(10, random_state=3)
    gap.fit(x[train[1:]], data.values["band_gap"][train[1:]])  # noqa: PD011
    stable = RandomForestClassifier(10, random_state=3, class_weight="balanced")
    stable.fit(x[train], data.values["stability"][train])  # noqa: PD011
    rows_of = {formula: row for row, formula in enumerate(data.formulas)}
    at = x[found["formula"].map(rows_of)]
    assert found["band_gap_pred"].tolist() == gap.predict(at).tolist()
    assert found["stability_pred"].tolist() == stable.predict_proba(at)[:, 1].tolist()


def test_features_of_other_formulas_are_refused(folder: Path, tmp_path: Path):
    table = pd.DataFrame({"formula": ["CaTiO3"], "x": [1.0]})
    table.to_parquet(tmp_path / "magpie.parquet")
    with pytest.raises(InputError, match="other formulas"):
        fit_baseline(
            settings(), "baseline", [0], folder / "compositions.parquet", folder / "split.json",
            tmp_path / "magpie.parquet", tmp_path, 1,
        )  # fmt: skip
