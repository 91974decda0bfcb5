"""The trained seeds of a composition model, which predict together."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from castbench.errors import InputError
from castbench.evaluation.records import read_run
from castbench.models import build_composition_model
from castbench.models.composition import Compositions
from castbench.training.multitask import to_unit
from castbench.training.schedule import batches

log = logging.getLogger(__name__)
BATCH = 512  # formulas predicted at once


class Ensemble:
    """The finished runs of a model; a seed whose run is not costs a line in the log.

    Raises:
        InputError: no run is finished.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, seeds: list[int], fabric: Fabric):
        self.device = fabric.device
        self.seeds: list[int] = []
        self.classification = list(settings["classification"])
        targets = [*settings["regression"], *settings["classification"]]
        # Each as it was validated: in the precision of the training.
        self.members: list[tuple[Any, dict[str, tuple[float, float]]]] = []
        for seed in seeds:
            record = read_run(folder / str(seed))
            if record["status"] != "finished":
                log.warning("%s: %s, %s; left out", folder / str(seed), record["status"], record["reason"])
                continue
            network = build_composition_model(
                settings["model"], settings["architecture"], targets, settings["training"]["task_weights"]
            )
            network.load_trained_state(load_file(folder / str(seed) / "model.safetensors"))
            scale = {target: (s["mean"], s["std"]) for target, s in record["scale"].items()}
            self.members.append((fabric.setup_module(network).eval(), scale))
            self.seeds.append(seed)
        if not self.members:
            raise InputError(
                f"{folder}: no run is finished, of seeds {', '.join(map(str, seeds))}; see the lines above"
            )

    def predict(self, numbers: np.ndarray, fractions: np.ndarray) -> dict[str, np.ndarray]:
        """{target: (seeds, n)} numbers in their unit and probabilities of class 1."""
        source = Compositions(torch.from_numpy(numbers), torch.from_numpy(fractions), self.device)
        rows = torch.arange(len(numbers))
        found: dict[str, list[np.ndarray]] = {}
        with torch.inference_mode():
            for network, scale in self.members:
                parts = [network(source.batch(chosen)) for chosen in batches(rows, BATCH)]
                whole = {target: torch.cat([part[target] for part in parts]).cpu() for target in parts[0]}
                for target, values in to_unit(whole, scale, self.classification).items():
                    found.setdefault(target, []).append(values)
        return {target: np.stack(values) for target, values in found.items()}
