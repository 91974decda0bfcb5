"""Predictions of trained models for crystals in files."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from castbench.errors import InputError
from castbench.evaluation.new_crystals import make_caches, make_states, run_encoder, write_materials
from castbench.evaluation.trained import load_run, read_config, read_run
from castbench.labels import TARGETS
from castbench.provenance import atomic_path
from castbench.training.dataset import Crystals
from castbench.training.objectives import in_unit
from castbench.training.objectives import predict as predict_rows
from castbench.training.session import ONE_DEVICE, open_session

log = logging.getLogger(__name__)
OUTPUT = Path("predictions.csv")
WANTED = "give results/DATASET/runs/TARGET/MODEL, or a seed's folder in it"
SHOWN = 20  # crystals whose predictions the log shows


def predict(
    run: Path, crystals: list[Path], /, output: Path = Path("predictions.csv"), threads: int = 1
) -> None:
    """Predict crystals with a trained model; of several seeds, also their mean and spread.

    Graphs and texts are made as for the run's data set, in a temporary folder beside the output, which needs
    room for them; memory does not grow with the crystals. The run's own test crystals, in the order of its
    split, get the bits of its predictions.parquet on the same kind of machine; among other crystals they get
    them to rounding.

    Args:
        run: results/{dataset}/runs/{target}/{model}, or one seed's folder in it.
        crystals: files and folders: CIF, POSCAR and whatever else pymatgen reads; tables (JSON lines, CSV,
            Parquet) with columns as for `materials.source: local`; rows of materials.parquet.
        output: CSV, or Parquet by its ending: id, source (file, or file:row), formula, and in the target's
            unit the mean over seeds, their sample standard deviation (none for one seed), and each seed's
            prediction.
        threads: processes that build graphs.

    Raises:
        InputError: no run here is finished; a crystal has no prediction, after all others have theirs.
    """
    runs = finished_runs(run)
    record, config = read_run(runs[0]), read_config(runs[0])
    results = runs[0].resolve().parents[3]
    encoder = run_encoder(record, results)
    target = TARGETS[record["target"]]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".predict") as temporary:
        folder = Path(temporary)
        materials = folder / "materials.parquet"
        sources, failures = write_materials(crystals, materials)
        if not sources:
            raise InputError(f"none of the {failures} crystals can be read; the lines above say why")
        make_caches(materials, folder, results, encoder, threads)
        found, predicted = predict_runs(runs, config, folder, results, encoder)
        names = pq.read_table(materials, columns=["material_id", "formula"]).take(found.tolist()).to_pandas()
    table = pd.DataFrame(
        {
            "id": names["material_id"],
            "source": [sources[row] for row in found],
            "formula": names["formula"],
            f"{target.name} ({target.unit})": predicted.mean(axis=0),
            f"std over seeds ({target.unit})": predicted.std(axis=0, ddof=1) if len(runs) > 1 else np.nan,
            **{f"seed {run.name} ({target.unit})": p for run, p in zip(runs, predicted, strict=True)},
        }
    )
    with atomic_path(output) as partial:
        if output.suffix == ".parquet":
            table.to_parquet(partial, index=False)
        else:
            table.to_csv(partial, index=False, lineterminator="\n")
    for _, _, formula, mean, std, *_ in table.head(SHOWN).itertuples(index=False, name=None):
        spread = f" +- {std:.4g} over {len(runs)} seeds" if len(runs) > 1 else ""
        log.info("%s: %s %.4g %s%s", formula, target.name, mean, target.unit, spread)
    log.info("%d crystals in %s", len(table), output)
    failures += len(sources) - len(table)
    if failures:
        raise InputError(
            f"{failures} of {len(table) + failures} crystals have no prediction; the lines above say why, "
            f"and {output} has the others"
        )


def finished_runs(run: Path) -> list[Path]:
    """The run itself, or the finished ones of a model's folder; the others cost a line in the log.

    Raises:
        InputError: there is none, or it predicts no property of crystals.
    """
    alone = (run / "metrics.json").exists()
    seeds = [run] if alone else sorted(run.glob("[0-9]*"), key=lambda folder: int(folder.name))
    finished = []
    for folder in seeds:
        record = read_run(folder)
        if "target" not in record and record["status"] != "missing":
            what = "is a pretraining" if "objective" in record else "reads formulas; use screen_compositions"
            raise InputError(f"{folder}: {what}; {WANTED}")
        if record["status"] == "finished":
            finished.append(folder)
        else:
            log.warning("%s: %s, %s; left out", folder, record["status"], record.get("reason"))
    if not finished:
        raise InputError(f"{run}: no finished run is here; {WANTED}")
    return finished


def predict_runs(
    runs: list[Path], config: dict[str, Any], folder: Path, results: Path, encoder: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n,) of the crystals in the caches that have a graph, and predictions (runs, n) in unit."""
    training = config["training"] | ONE_DEVICE
    if training["device"] == "cuda" and not torch.cuda.is_available():
        log.warning("the run had a GPU, and there is none here; predictions may differ in their last digits")
        training["device"] = "cpu"
    fabric = open_session(training, training["threads"])
    crystals: Crystals | None = None
    predicted = []
    for run in runs:
        network, record = load_run(run, encoder), read_run(run)
        if crystals is None:
            states = None
            if network.text_layer is not None and encoder is not None:
                remaining = network.text.n_layers - network.text_layer
                states = make_states(folder, results, encoder, remaining, fabric.device.type)
            crystals = Crystals(network, folder / "graphs", folder / "tokens", states, fabric.device)
            rows = torch.from_numpy(np.flatnonzero(crystals.has_graph))
            if not len(rows):
                raise InputError("no crystal has a graph; the lines above say why")
        module = fabric.setup_module(network).eval()
        outputs = predict_rows(module, crystals, rows, training["batch_size"])
        task = TARGETS[record["target"]].task
        predicted.append(in_unit(outputs, task, record["target_mean"], record["target_std"]))
    return rows.numpy(), np.stack(predicted)
