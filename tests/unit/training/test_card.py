"""The model card says what the record says, in the Hub's form."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from castbench.deviations import deviations
from castbench.training.card import header, model_card
from composition_data import aggregated, composition_settings, rows, split
from training_jobs import run_job, words


def read(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Metadata and text of the card of a run, and the run's record."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body, json.loads((folder / "metrics.json").read_text())


def run(data, output: Path, **training: Any) -> Path:
    assert run_job(data.train("crysmmnet_frozen", output, **training)) == 0
    return output / "0"


def test_an_encoder_of_a_folder_is_no_base_model_of_the_hub():
    record = {"dataset": "mine", "text_encoder": {"id": "bert", "revision": "local"}}
    assert "base_model" not in header(record, "mine", [])
    assert header(record | {"text_encoder": {"id": "a/bert"}}, "mine", [])["base_model"] == "a/bert"


def test_a_finished_run_has_its_scores_with_units(data, tmp_path):
    head, body, record = read(run(data, tmp_path, epochs=1))
    assert head["library_name"] == "castbench" and "crystals" in head["tags"] and "license" not in head
    assert "base_model" not in head and record["text_encoder"]["id"] == "bert"
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"]["name"] == "invented" and result["task"]["name"] == "total_energy"
    by_type = {metric["type"]: metric for metric in result["metrics"]}
    assert by_type["mae"] == {"type": "mae", "name": "MAE (eV/atom)", "value": record["test"]["mae"]}
    assert f"| total_energy | test | 6 | MAE (eV/atom) | {record['test']['mae']:.6g} |" in body
    assert f"| total_energy | validation | 6 | RMSE (eV/atom) | {record['validation']['rmse']:.6g} |" in body
    assert "# CrysMMNet (frozen), Total energy (eV/atom), invented, seed 0" in body
    assert "27 train, 6 validation, 6 test crystals; 1 dropped (no graph)" in body
    assert record["commit"] in body and record["inputs"]["graphs"] in body
    assert "weights of epoch 0 (from 0), the best on validation; the test set was read once" in body
    for entry in deviations("cast"):
        assert f"- {entry['id']}: " in body
    for section in ("## Use", "## Limits", "## Training"):
        assert section in body


def test_a_failed_run_says_so_and_has_no_score(data, tmp_path):
    head, body, record = read(run(data, tmp_path, learning_rate=1e38))
    assert record["status"] == "failed" and "model-index" not in head
    assert "**This run is failed: training loss is not finite at step" in body and "## Results" not in body
    assert "weights of epoch" not in body and "the test set was read" not in body


def test_a_pretraining_predicts_nothing(data, tmp_path):
    assert run_job(data.pretrain("contrastive", tmp_path / "0")) == 0
    head, body, record = read(tmp_path / "0")
    assert "model-index" not in head
    assert f"| contrastive | validation | 6 | accuracy | {record['validation']['accuracy']:.6g} |" in body
    assert (
        "they predict no property" in body
        and "best on validation" in body
        and "the test set was read" not in body
    )


def test_a_model_of_formulas_has_numbers_and_classes(tmp_path):
    folder = aggregated(tmp_path, rows())
    split(folder)
    command = words(
        "train_compositions",
        settings=composition_settings(epochs=1),
        model="edm_transformer",
        seeds=[0],
        compositions=folder / "compositions.parquet",
        split=folder / "split.json",
        output=tmp_path / "runs",
        threads=1,
    )
    assert run_job(command) == 0
    head, body, record = read(tmp_path / "runs" / "0")
    gap, stability = head["model-index"][0]["results"]
    assert gap["metrics"][0]["value"] == record["scores"]["band_gap"]["test"]["mae"]
    assert gap["metrics"][0]["name"] == "MAE (eV)" and stability["task"]["type"] == "classification"
    assert "formulas" in head["tags"] and "polymorphs get one answer" in body
    assert f"| band_gap | test | {record['n']['test']} | MAE (eV) |" in body
    assert "castbench predict THIS_FOLDER CaTiO3 CsSnI3 ..." in body
    assert all(entry["id"] in body for entry in deviations("compositions"))


def test_a_fold_of_matbench_has_its_classes_scores_and_the_last_weights():
    record = {
        "dataset": "matbench", "model": "structure_only", "target": "matbench_mp_is_metal.fold_1", "seed": 0,
        "status": "finished", "n": {"train": 80, "validation": 0, "test": 20}, "commit": "c", "versions": {},
        "epochs": 3, "steps": 9, "best_epoch": 2, "test": {"roc_auc": 0.9, "accuracy": 0.8, "recall": {}},
    }  # fmt: skip
    card = model_card(record, {"training": {"selection": "last"}})
    (result,) = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert result["task"]["type"] == "classification"
    assert {"type": "roc_auc", "name": "ROC AUC", "value": 0.9} in result["metrics"]
    assert "| matbench_mp_is_metal.fold_1 | test | 20 | accuracy | 0.8 |" in card
    assert "weights of epoch 2 (from 0), the last; the test set was read once" in card
    assert all(f"- {entry['id']}: " in card for entry in deviations("matbench"))


def test_a_card_says_what_a_model_is_made_of():
    record = {
        "dataset": "mp", "model": "cast", "target": "band_gap", "seed": 2, "status": "finished",
        "n": {"train": 1200, "validation": 7, "test": 9}, "n_dropped": {"no graph": 0, "no target": 3},
        "commit": "c", "versions": {"python": "3.11", "torch": "2.1"}, "epochs": 3, "steps": 9000,
        "best_epoch": 1, "text": "lora", "parameters": {"total": 5000, "trainable": 40},
        "text_encoder": {"id": "org/bert", "revision": "r1", "checksum": "0"},
        "pretrained": {"objective": "masked_node", "seed": 2, "sha256": "0"},
        "inputs": {"graphs": "aa", "splits": ["bb", "cc"], "states": None},
        "test": {"mae": 0.25, "rmse": 0.5, "r2": 0.75},
    }  # fmt: skip
    card = model_card(record, {"architecture": {"alignn": {}, "lora": {}}, "training": {}})
    (result,) = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert result["task"] == {"type": "regression", "name": "band_gap"}
    assert result["dataset"]["split"] == "test"
    assert [metric["name"] for metric in result["metrics"]] == ["MAE (eV)", "RMSE (eV)", "R²"]
    for part in (
        "CAST (Lee et al. 2025). Input: graph + text (ALIGNN).",
        "Text encoder: org/bert (r1), lora. 40 of its 5,000 parameters were trained.",
        "It started from the pretraining masked_node, seed 2. Sizes: `config.json` (alignn, lora).",
        "| band_gap | test | 9 | R² | 0.75 |",
        "1,200 train, 7 validation, 9 test crystals; 3 dropped (no target)\n",
        "- 3 epochs, 9,000 steps; weights of epoch 1",
        "- Seed 2; castbench commit `c`\n- Versions: python 3.11, torch 2.1\n",
        "- SHA-256 of graphs: `aa`\n- SHA-256 of splits: `bb`\n- SHA-256 of splits: `cc`\n",
        "castbench predict THIS_FOLDER crystal.cif ...",
    ):
        assert part in card, part


@pytest.mark.parametrize("status", ["skipped", "failed"])
def test_equal_records_have_equal_cards_and_odd_reasons_stay_text(status):
    record = {
        "dataset": "a: b", "model": "cast", "target": "band_gap", "seed": 1, "status": status, "n": {},
        "reason": "no: --- reason", "commit": "c", "versions": {"torch": "2"},
    }  # fmt: skip
    card = model_card(record, {})
    assert card == model_card(dict(reversed(record.items())), {})
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "castbench"
