"""Train a model of compositions on all of its targets at once, one run a seed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from lightning_fabric import Fabric
from torch import Tensor

from castbench.compositions.formulas import check_fractions, encode_formulas
from castbench.compositions.targets import composition_values
from castbench.errors import InputError
from castbench.evaluation.compositions import score_run, write_composition_predictions
from castbench.materials.splits import PARTS, load_split
from castbench.materials.structures import RecordError
from castbench.models import build_composition_model
from castbench.models.composition import CompositionNetwork, Compositions
from castbench.provenance import alone_in, sha256_file
from castbench.training.loop import Trainer
from castbench.training.multitask import MultiTask
from castbench.training.records import Result, run_result, without_prediction, write_run
from castbench.training.session import open_session, run_key

log = logging.getLogger(__name__)


@dataclass
class CompositionData:
    """What all runs share.

    Attributes:
        formulas: of every row.
        numbers, fractions: packed compositions (n, slots).
        values: {target: (n,)}, NaN where missing.
        rows: {part: (m,)} rows of each part of the split.
        checksums: of the files that were read.
    """

    formulas: list[str]
    numbers: np.ndarray
    fractions: np.ndarray
    values: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    checksums: dict[str, str]

    def part(self, name: str) -> tuple[list[str], dict[str, np.ndarray]]:
        """Formulas and true values of a part of the split."""
        rows = self.rows[name]
        truth = {target: values[rows] for target, values in self.values.items()}
        return [self.formulas[row] for row in rows], truth

    def record(self) -> dict[str, Any]:
        """What metrics.json says about the data."""
        return {"n": {part: len(rows) for part, rows in self.rows.items()}, "inputs": self.checksums}


def read_compositions(settings: dict[str, Any], compositions: Path, split: Path) -> CompositionData:
    """Read the formulas, their targets and their split.

    Raises:
        InputError: a formula has more elements than slots, or the split is of other formulas.
    """
    table = pq.read_table(compositions)
    formulas = table["formula"].to_pylist()
    try:
        numbers, fractions = encode_formulas(formulas, settings["max_elements"])
    except RecordError as error:
        raise InputError(f"{compositions}: {error}; run collect_compositions again") from None
    check_fractions(numbers, fractions)
    lists, places = load_split(split), {formula: row for row, formula in enumerate(formulas)}
    if absent := [formula for part in PARTS for formula in lists[part] if formula not in places]:
        raise InputError(f"{split}: {absent[0]} is not in {compositions}; run split_compositions again")
    return CompositionData(
        formulas,
        numbers,
        fractions,
        composition_values(table, settings["regression"], settings["classification"]),
        {part: np.array([places[formula] for formula in lists[part]]) for part in PARTS},
        {"compositions": sha256_file(compositions), "split": lists["checksum"]},
    )


def train_compositions(
    settings: dict[str, Any],
    model: str,
    seeds: list[int],
    compositions: Path,
    split: Path,
    output: Path,
    threads: int,
) -> None:
    """Train a model of `COMPOSITION_REGISTRY`, all `seeds` one after another, a run folder for each.

    Args:
        settings: {dataset, max_elements, regression, classification, loss, architecture, training}; stands
            as config.json in each run.
        model: a name of the registry.
        seeds: of the runs.
        compositions: table of aggregate_compositions.
        split: of split_compositions.
        output: gets {seed}/ and the undeclared checkpoints/{seed}/.
        threads: cores that the job has.
    """
    fabric = open_session(settings["training"], threads)
    data = read_compositions(settings, compositions, split)
    record = {"dataset": settings["dataset"], "model": model, **data.record()}
    source = Compositions(torch.from_numpy(data.numbers), torch.from_numpy(data.fractions), fabric.device)
    for seed in seeds:
        own = record | {"seed": seed}
        log.info("%s, seed %d: %s", model, seed, record["n"])
        torch.manual_seed(seed)
        targets = [*settings["regression"], *settings["classification"]]
        network = build_composition_model(
            model, settings["architecture"], targets, settings["training"]["task_weights"]
        )
        train_composition_seed(network, source, data, own, settings, fabric, output)


def train_composition_seed(
    network: CompositionNetwork,
    source: Compositions,
    data: CompositionData,
    record: dict[str, Any],
    settings: dict[str, Any],
    fabric: Fabric,
    output: Path,
) -> None:
    """Train a run, predict validation and test, once, with the best weights, and write its folder."""
    training, seed = settings["training"], record["seed"]
    rows: dict[str, Tensor] = {part: torch.from_numpy(found) for part, found in data.rows.items()}
    classes = list(settings["classification"])
    objective = MultiTask(source, data.values, classes, rows, training, settings["loss"])
    key = run_key(fabric, settings=settings, record=record)
    checkpoints, folder = output / "checkpoints" / str(seed), output / str(seed)
    trainer = Trainer(network, objective, training, training["epochs"], seed, fabric, checkpoints, key)
    trainer.fit()
    result = run_result(trainer, lambda rows: [data.formulas[row] for row in rows.tolist()])
    result.record |= {
        "scale": {
            target: dict(zip(("mean", "std"), s, strict=True)) for target, s in objective.scale.items()
        },
        "class_weights": {
            target: {"alpha": list(alpha), "gamma": gamma}
            for target, (alpha, gamma) in objective.weights.items()
        },
    }
    parts = {}
    if result.status == "finished":
        for part in ("validation", "test"):
            predicted = objective.in_unit(objective.predict(trainer.module, rows[part]))
            parts[part] = (*data.part(part), predicted)
        lost = [
            formula
            for formulas, _, predicted in parts.values()
            for formula in compress(formulas, ~np.isfinite(np.stack([*predicted.values()])).all(axis=0))
        ]
        if lost:
            parts, result = {}, without_prediction(result, lost)
    if fabric.is_global_zero:
        with alone_in(folder):
            write_composition_run(folder, record, settings, result, parts, objective.columns)


def write_composition_run(
    folder: Path,
    record: dict[str, Any],
    settings: dict[str, Any],
    result: Result,
    parts: dict[str, tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]],
    columns: tuple[str, ...] = (),
) -> None:
    """Write the files of a run, scores included; `parts` is empty for a run that has no result."""
    classes = settings["classification"]
    if parts:
        write_composition_predictions(folder, parts)
        scored = score_run(
            pd.read_parquet(folder / "predictions.parquet"), settings["regression"], list(classes)
        )
        result.record["scores"] = scored
        for target, found in scored.items():
            shown = found["test"].get("mae", found["test"].get("average_precision"))
            log.info("%s, seed %s, test: %s %s", record["model"], record["seed"], target, shown)
    else:
        targets = [*settings["regression"], *classes]
        nothing: dict[str, np.ndarray] = {target: np.zeros(0) for target in targets}
        write_composition_predictions(folder, {"test": ([], nothing, nothing)})
    write_run(folder, record, settings, result, columns)
