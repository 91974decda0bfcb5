"""The files of a run folder: all of them are written, whatever became of the run."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from castbench.models.base import Network
from castbench.provenance import atomic_path, code_version, package_versions, write_json
from castbench.text import read_encoder
from castbench.training.card import model_card
from castbench.training.checkpoint import encode
from castbench.training.loop import Run, Trainer

log = logging.getLogger(__name__)

HISTORY = ("epoch", "step", "learning_rate", "train_loss")
PREDICTIONS = pa.schema(
    [("material_id", pa.string()), ("split", pa.string()), ("y_true", pa.float64()), ("y_pred", pa.float64())]
)


@dataclass
class Result:
    """What became of a run; by default nothing.

    Attributes:
        status: "finished", "skipped" or "failed".
        reason: why it is not finished.
        record: for metrics.json.
        cost: for cost.json.
        history: one row an epoch.
        weights: trained parameters.
        predictions: ids, true and predicted values in the target's unit, of each part of the split.
    """

    status: str
    reason: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, tuple[list[str], np.ndarray, np.ndarray]] = field(default_factory=dict)


def run_record(network: Network, run: Run) -> dict[str, Any]:
    """What metrics.json says about a network and its training."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return {
        "text": network.text_mode,
        "parameters": {
            "total": sum(n for n, _ in sizes),
            "trainable": sum(n for n, trained in sizes if trained),
        },
        "steps": run.step,
        "epochs": len(run.history),
        "best_epoch": run.best_epoch,
    }


def cost(run: Run, crystals: int) -> dict[str, Any]:
    """The content of cost.json: wall time of training and validation, crystals trained on per second of it.

    Peak memory (MiB) and hardware are of the first of several processes.
    """
    samples = run.step * crystals // run.steps
    return {
        "seconds": round(run.seconds, 3),
        "samples_per_second": round(samples / run.seconds, 3) if run.seconds else None,
        "peak_memory_mb": round(run.peak_memory_mb, 1),
        "hardware": run.hardware,
    }


def encoder_record(network: Network, encoder: Path) -> dict[str, str] | None:
    """What metrics.json says about the text encoder; None for a model that reads no text."""
    if network.text is None:
        return None
    manifest = read_encoder(encoder, names=())
    return {key: manifest[key] for key in ("id", "revision", "checksum")}


def run_result(trainer: Trainer, names: Callable[[Tensor], list[str]]) -> Result:
    """What became of a training: it is finished, or it failed at a value that is not finite.

    `names` gives the ids of rows; a failure lists those of its batch.
    """
    run = trainer.run
    record = run_record(trainer.network, run)
    spent = cost(run, len(trainer.objective.rows))
    if run.failure is None:
        return Result("finished", None, record, spent, run.history, run.best)
    ids = names(run.failure.rows)
    log.error(
        "%s is not finite at step %d, learning rate %.3g; the run stops. Its batch: %s",
        run.failure.what, run.failure.step, run.failure.learning_rate, ", ".join(ids),
    )  # fmt: skip
    where = {"step": run.failure.step, "learning_rate": run.failure.learning_rate, "material_ids": ids}
    reason = f"{run.failure.what} is not finite at step {run.failure.step}"
    return Result("failed", reason, record | {"failure": where}, spent, run.history)


def without_prediction(result: Result, ids: list[str]) -> Result:
    """What became of a training whose weights predict nothing finite for the crystals or formulas `ids`."""
    log.error("predictions are not finite, so the run has failed; they are those of %s", ", ".join(ids))
    reason = f"predictions are not finite, {len(ids)} in all, the first that of {ids[0]}"
    record = result.record | {"failure": {"material_ids": ids}}
    return Result("failed", reason, record, result.cost, result.history)


def write_run(
    folder: Path, record: dict[str, Any], settings: dict[str, Any], result: Result, scores: tuple[str, ...]
) -> None:
    """Write the files of a run, metrics.json last.

    Args:
        folder: of the run.
        record: what the run was, for metrics.json. Neither has times, so that equal runs give equal files.
        settings: as it ran, for config.json.
        result: what became of it.
        scores: names of what validation adds to a row of the history.
    """
    write_json(folder / "config.json", settings)
    write_json(folder / "cost.json", result.cost)
    with (
        atomic_path(folder / "history.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, [*HISTORY, *scores], lineterminator="\n")
        table.writeheader()
        table.writerows(result.history)
        file.flush()
    with atomic_path(folder / "model.safetensors") as partial:
        partial.write_bytes(encode(result.weights, settings))
    outcome = {"status": result.status, "reason": result.reason, **result.record}
    whole = record | outcome | {"versions": package_versions(), "commit": code_version()}
    with atomic_path(folder / "README.md") as partial:
        partial.write_text(model_card(whole, settings), encoding="utf-8")
    write_json(folder / "metrics.json", whole)


def write_predictions(folder: Path, result: Result) -> None:
    """Write predictions.parquet; without a row for a run that has no result."""
    tables = [
        pa.table([ids, [part] * len(ids), truth, predicted], schema=PREDICTIONS)
        for part, (ids, truth, predicted) in result.predictions.items()
    ]
    with atomic_path(folder / "predictions.parquet") as partial:
        pq.write_table(pa.concat_tables([PREDICTIONS.empty_table(), *tables]).combine_chunks(), partial)
