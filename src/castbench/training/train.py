"""Train a model on a target, one run a seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from castbench.errors import InputError
from castbench.labels import TARGETS
from castbench.materials.splits import PARTS, load_split
from castbench.materials.targets import target_values
from castbench.models import build_model, load_pretrained
from castbench.models.base import Network
from castbench.provenance import alone_in, sha256_file
from castbench.staging import stage_cache
from castbench.training.dataset import Crystals
from castbench.training.loop import Trainer, terminable
from castbench.training.objectives import Classification, Regression
from castbench.training.records import (
    Result,
    encoder_record,
    run_result,
    without_prediction,
    write_predictions,
    write_run,
)
from castbench.training.session import open_session, run_key
from castbench.training.turns import take_turns

log = logging.getLogger(__name__)

OBJECTIVES = {"regression": Regression, "classification": Classification}


def train_model(
    settings: dict[str, Any],
    model: str,
    target: str,
    seeds: list[int],
    materials: Path,
    split: Path,
    graphs: Path,
    tokens: Path,
    states: Path | None,
    encoder: Path,
    pretrained: list[Path],
    output: Path,
    threads: int,
    stage: int = 0,
) -> None:
    """Train `model` on `target`, all `seeds` in one process, and write a run folder for each.

    The seeds run one after another, or side by side (`settings["training"]["seeds_together"]`), to the same
    results: no run shares a random stream with another.

    Args:
        settings: {dataset, architecture, training, ...}; stands as config.json in each run.
        model: a name of the models' registry.
        target: a name of `labels.TARGETS`.
        seeds: of the runs.
        materials: materials.parquet.
        split: id lists of the target.
        graphs: cache of graphs; a crystal without a graph is dropped, whatever the model reads.
        tokens: cache of tokens, looked at only if the model reads text.
        states: cache of token states, for a model that reads them.
        encoder: folder of the text encoder.
        pretrained: a pretraining run for each seed, in a folder of the seed's name; empty: none.
        output: gets {seed}/ and the undeclared checkpoints/{seed}/.
        threads: cores that the job has.
        stage: 1 copies the caches to the node's own disk first.

    Raises:
        InputError: a cache is missing or of other materials; a pretraining run is missing.
    """
    training = dict(settings["training"])
    together = training.pop("seeds_together", False)  # no run depends on it
    settings = settings | {"training": training}
    fabric = open_session(training, threads)
    if stage:
        graphs, tokens = stage_cache(graphs), stage_cache(tokens)
        states = states and stage_cache(states)
    lists = load_split(split)
    record: dict[str, Any] = {"dataset": settings["dataset"], "model": model, "target": target}
    record |= {"unit": TARGETS[target].unit, "validation": None, "test": None}
    data: Data | None = None

    def run_of(seed: int) -> Iterator[None]:
        nonlocal data, record
        torch.manual_seed(seed)
        network = build_model(model, settings["architecture"], encoder)
        if data is None:
            crystals = Crystals(network, graphs, tokens, states, fabric.device)
            data = read_data(crystals, materials, target, lists)
            record |= data.record() | {"text_encoder": encoder_record(network, encoder)}
            if (
                not lists["reason"]
                and not lists["validation"]
                and settings["training"].get("selection") != "last"
            ):
                raise InputError(
                    f"{split}: sets nothing aside for validation, by which the weights are chosen; "
                    "make training.selection last"
                )
        source, lack = load_start(network, model, seed, pretrained)
        own = record | {"seed": seed, "pretrained": source}
        if lack or data.lack:
            result = Result("skipped", data.lack or lack)
            log.warning("%s, %s, seed %d: skipped, %s", model, target, seed, result.reason)
        else:
            log.info("%s, %s, seed %d: %s", model, target, seed, record["n"])
            checkpoints = output / "checkpoints" / str(seed)
            result = yield from train_seed(network, data, own, settings, fabric, checkpoints, terminated)
        if fabric.is_global_zero:
            folder = output / str(seed)
            config = settings | {"model": model, "target": target, "seed": seed}
            with alone_in(folder):
                write_predictions(folder, result)
                write_run(folder, own, config, result, OBJECTIVES[TARGETS[target].task].columns)

    with terminable() as terminated:
        take_turns([run_of(seed) for seed in seeds], len(seeds) if together else 1, fabric.device)


@dataclass
class Data:
    """What all seeds of a job share."""

    crystals: Crystals
    values: np.ndarray  # (G,) in the target's unit
    rows: dict[str, Tensor]  # of each part of the split
    dropped: dict[str, int]  # crystals of the split that are in no part, by reason
    checksums: dict[str, str | None]
    lack: str | None  # why there is nothing to train on

    def record(self) -> dict[str, Any]:
        """What metrics.json says about the data."""
        return {
            "n": {part: len(rows) for part, rows in self.rows.items()},
            "n_dropped": self.dropped,
            "n_without_text": self.crystals.n_without_text(torch.cat(list(self.rows.values()))),
            "inputs": self.checksums,
        }


def read_data(crystals: Crystals, materials: Path, target: str, lists: dict[str, Any]) -> Data:
    """Rows and target values of a split; crystals without a graph or a value are dropped and counted.

    Raises:
        InputError: materials are not those of the caches.
    """
    table = pq.read_table(materials, columns=["material_id", TARGETS[target].column])
    if table["material_id"].to_pylist() != crystals.material_ids:
        raise InputError(f"{materials}: other crystals than the graphs have; build the graphs again")
    values = target_values(table, target)
    rows, dropped = {}, {"no graph": 0, "no target": 0}
    for part in PARTS:
        found, without_graph = crystals.rows(lists[part])
        known = torch.from_numpy(np.isfinite(values[found.numpy()]))
        rows[part] = found[known]
        dropped["no graph"] += without_graph
        dropped["no target"] += int((~known).sum())
    for why, n in dropped.items():
        if n:
            log.warning("%s: %d crystals dropped, %s", target, n, why)
    empty = [part for part in PARTS if lists[part] and not len(rows[part])]
    lack = lists["reason"] or (f"no crystal is left in {empty[0]}" if empty else None)
    return Data(crystals, values, rows, dropped, crystals.checksums | {"split": lists["checksum"]}, lack)


def load_start(
    network: Network, model: str, seed: int, pretrained: list[Path]
) -> tuple[dict[str, Any] | None, str | None]:
    """Load the pretrained weights that `network` starts from; return which these are, or why there are none.

    Without `pretrained`, every network starts anew: cast_scratch is cast without it.

    Raises:
        InputError: no pretraining run of this seed is given.
    """
    if not (network.pretrained and pretrained):
        return None, None
    folder = next((folder for folder in pretrained if folder.name == str(seed)), None)
    if folder is None or not (folder / "metrics.json").is_file():
        raise InputError(f"{model}, seed {seed}: no pretraining run of this seed; run pretrain_model first")
    run = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if run["status"] != "finished":
        return None, f"pretraining {run['objective']}, seed {seed}, is {run['status']}: {run['reason']}"
    weights = folder / "model.safetensors"
    load_pretrained(network, load_file(weights))
    return {"objective": run["objective"], "seed": seed, "sha256": sha256_file(weights)}, None


def train_seed(
    network: Network,
    data: Data,
    record: dict[str, Any],
    settings: dict[str, Any],
    fabric: Fabric,
    checkpoints: Path,
    terminated: Event,
) -> Generator[None, None, Result]:
    """Train a run, a step at a time, then predict validation and test, once, with the selected weights."""
    training = settings["training"]
    objective = OBJECTIVES[TARGETS[record["target"]].task](
        data.crystals, data.values, data.rows["train"], data.rows["validation"], training
    )
    key = run_key(fabric, settings=settings, record=record)
    trainer = Trainer(
        network, objective, training, training["epochs"], record["seed"], fabric, checkpoints, key
    )
    yield from trainer.steps(terminated)
    result = run_result(trainer, data.crystals.ids)
    result.record |= {"target_mean": objective.mean, "target_std": objective.std}
    if result.status == "failed":
        return result
    for part in ("validation", "test"):
        rows = data.rows[part]
        if not len(rows):  # a split may set nothing aside for validation
            continue
        predicted = objective.in_unit(objective.predict(trainer.module, rows))
        result.predictions[part] = data.crystals.ids(rows), data.values[rows.numpy()], predicted
    if lost := [i for ids, _, y in result.predictions.values() for i in compress(ids, ~np.isfinite(y))]:
        return without_prediction(result, lost)
    for part, (_, truth, predicted) in result.predictions.items():
        result.record[part] = objective.score(truth, predicted)
    score = result.record["test"][objective.main]
    log.info("%s, test: %s %s %s", record["target"], objective.main, score, record["unit"])
    return result
