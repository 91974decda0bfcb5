"""Trained models as their runs left them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from castbench.errors import InputError
from castbench.models import build_model, build_pretraining
from castbench.models.base import Network


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run folder: its settings."""
    return json.loads((run / "config.json").read_text(encoding="utf-8"))


def results_of(run: Path) -> Path:
    """The folder results/{dataset} of a run, results/{dataset}/runs/{target}/{model}/{seed}.

    Raises:
        InputError: the run lies elsewhere.
    """
    above = run.resolve().parents
    if len(above) < 4 or not (above[3] / "graphs" / "manifest.json").is_file():
        raise InputError(
            f"{run}: is not where it was trained, results/DATASET/runs/TARGET/MODEL/SEED, beside the graphs"
            " and texts that say how its input is made; put it back"
        )
    return above[3]


def load_run(run: Path, encoder: Path | None) -> Network:
    """The trained network of a run or a pretraining, in evaluation mode."""
    config = read_config(run)
    if "model" in config:
        network = build_model(config["model"], config["architecture"], encoder)
    else:
        network = build_pretraining(config["objective"], config["architecture"], encoder)
    network.load_trained_state(load_file(run / "model.safetensors"))
    return network.eval()
