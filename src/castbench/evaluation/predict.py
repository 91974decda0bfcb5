"""Predictions of trained models for crystals in files, or for formulas."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from castbench.errors import InputError
from castbench.evaluation.ensemble import Ensemble
from castbench.evaluation.new_crystals import (
    make_caches,
    make_states,
    read_columns,
    read_formulas,
    run_encoder,
    write_materials,
)
from castbench.evaluation.records import read_run
from castbench.evaluation.trained import load_run, read_config, results_of
from castbench.labels import CLASS_TARGETS, TARGETS
from castbench.materials.structures import RecordError
from castbench.models import COMPOSITION_REGISTRY
from castbench.provenance import atomic_path, package_versions, sha256_file
from castbench.report import tables
from castbench.training.dataset import Crystals
from castbench.training.objectives import in_unit
from castbench.training.objectives import predict as predict_rows
from castbench.training.session import ONE_DEVICE, PACKAGES, open_session

log = logging.getLogger(__name__)
OUTPUT = Path("predictions.csv")
WANTED = "give results/DATASET/runs/TARGET/MODEL, or a seed's folder in it"
SHOWN = 20  # crystals whose predictions the log shows


def predict(run: Path, crystals: list[Path], /, output: Path = OUTPUT, threads: int = 1) -> None:
    """Predict crystals or formulas with a trained model; of several seeds, also their mean and spread.

    Graphs and texts are made as for the run's data set, in a temporary folder beside the output, which needs
    room for them; memory does not grow with the crystals. The run's own test crystals, in the order of its
    split, get the bits of its predictions.parquet on the same kind of machine; among other crystals they get
    them to rounding.

    Args:
        run: results/{dataset}/runs/{target}/{model}, or one seed's folder in it; of a model of formulas,
            results/{dataset}/composition_runs/{model}.
        crystals: files and folders: CIF, POSCAR and whatever else pymatgen reads; tables (JSON lines, CSV,
            Parquet) with columns as those that the run's data set was read from, or called as ours; rows of
            materials.parquet. For a model of formulas: formulas, and tables with a column of them.
        output: CSV, or Parquet by its ending: id, source (file, or file:row), formula, and in the target's
            unit the mean over seeds, their sample standard deviation (none for one seed), and each seed's
            prediction; of a class, the probability.
        threads: processes that build graphs.

    Raises:
        InputError: no run here is finished; graphs or tokens have changed since; something has no prediction,
            after all others have theirs.
    """
    runs = finished_runs(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    if "target" in read_run(runs[0]):
        table, failures = predict_crystals(runs, crystals, output.parent, threads)
    else:
        table, failures = predict_formulas(runs, crystals)
    with atomic_path(output) as partial:
        if output.suffix == ".parquet":
            table.to_parquet(partial, index=False)
        else:
            table.to_csv(partial, index=False, lineterminator="\n")
    for row in tables.records(table.head(SHOWN)):
        known = {name: value for name, value in row.items() if isinstance(value, float) and value == value}
        values = (f"{name} {value:.4g}" for name, value in known.items())
        log.info("%s: %s", row["formula"], ", ".join(values))
    log.info("%d predictions in %s", len(table), output)
    if failures:
        raise InputError(
            f"{failures} of {len(table) + failures} have no prediction; the lines above say why, "
            f"and {output} has the others"
        )


def predict_crystals(
    runs: list[Path], crystals: list[Path], room: Path, threads: int
) -> tuple[pd.DataFrame, int]:
    """A row a crystal, and the number of those that have none; `room` is a folder for temporary files."""
    record, config = read_run(runs[0]), read_config(runs[0])
    results, target = results_of(runs[0]), TARGETS[record["target"]]
    for run in runs:
        check_caches(run, results)
    encoder = run_encoder(record, results)
    with tempfile.TemporaryDirectory(dir=room, prefix=".predict") as temporary:
        folder = Path(temporary)
        materials = folder / "materials.parquet"
        mapping = read_columns(results / "materials" / "manifest.json")
        sources, failures = write_materials(crystals, mapping, materials)
        if not sources:
            given = ", ".join(map(str, crystals))
            raise InputError(
                f"none of the {failures} crystals can be read; the lines above say why"
                if failures
                else f"{given}: there is no crystal; name files of any kind that `predict --help` lists"
            )
        make_caches(materials, folder, results, encoder, threads)
        found, predicted = predict_runs(runs, config, folder, results, encoder)
        names = pq.read_table(materials, columns=["material_id", "formula"]).take(found.tolist()).to_pandas()
    table = pd.DataFrame(
        {
            "id": names["material_id"],
            "source": [sources[row] for row in found],
            "formula": names["formula"],
            **columns(target.name, target.unit, runs, predicted),
        }
    )
    return table, failures + len(sources) - len(table)


def check_caches(run: Path, results: Path) -> None:
    """Refuse to predict by the settings of other caches than the run was trained on.

    Raises:
        InputError: the graphs or tokens of the data set are not those of the run.
    """
    for name, checksum in read_run(run)["inputs"].items():
        if name in ("graphs", "tokens") and checksum:
            manifest = results / name / "manifest.json"
            if not manifest.exists() or sha256_file(manifest) != checksum:
                raise InputError(
                    f"{results / name}: not what {run} was trained on; make it as it was, or train again"
                )


def predict_formulas(runs: list[Path], given: list[Path]) -> tuple[pd.DataFrame, int]:
    """A row a formula, and the number of those that have none.

    Raises:
        InputError: the model keeps no weights.
    """
    from castbench.compositions.formulas import encode_formulas  # element tables: only formulas need them

    record, config = read_run(runs[0]), read_config(runs[0])
    if record["model"] not in COMPOSITION_REGISTRY:
        raise InputError(f"{runs[0]}: {record['model']} keeps no weights; give the runs of a network")
    fabric = open_session(usable(config["training"]), config["training"]["threads"])
    seeds = [int(run.name) for run in runs]
    ensemble = Ensemble(config | {"model": record["model"]}, runs[0].parent, seeds, fabric)
    names, encoded, failures = [], [], 0
    mapping = read_columns(runs[0].resolve().parents[2] / "compositions" / "manifest.json")
    for name, formula in read_formulas(given, mapping):
        try:
            if isinstance(formula, RecordError):
                raise formula
            encoded.append(encode_formulas([formula], config["max_elements"]))
            names.append((name, str(formula)))
        except RecordError as error:
            log.error("%s: %s; no prediction", name, error)
            failures += 1
    if not encoded:
        raise InputError(f"none of the {failures} formulas can be read; the lines above say why")
    numbers, fractions = (np.concatenate(part) for part in zip(*encoded, strict=True))
    table: dict[str, Any] = {"source": [n for n, _ in names], "formula": [formula for _, formula in names]}
    for target, predicted in ensemble.predict(numbers, fractions).items():
        if target in CLASS_TARGETS:
            table |= columns(f"P({CLASS_TARGETS[target].positive})", "", runs, predicted)
        else:
            table |= columns(target, TARGETS[target].unit, runs, predicted)
    return pd.DataFrame(table), failures


def columns(name: str, unit: str, runs: list[Path], predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Mean over seeds, sample standard deviation, and the predictions (runs, n), by name with unit."""
    unit = f" ({unit})" if unit else ""
    spread = predicted.std(axis=0, ddof=1) if len(runs) > 1 else np.full(predicted.shape[1], np.nan)
    return {
        f"{name}{unit}": predicted.mean(axis=0),
        f"{name} std over seeds{unit}": spread,
        **{f"{name} seed {run.name}{unit}": values for run, values in zip(runs, predicted, strict=True)},
    }


def finished_runs(run: Path) -> list[Path]:
    """The run itself, or the finished ones of a model's folder; the others cost a line in the log.

    Raises:
        InputError: there is none, it predicts no property, or they differ in more than their seed.
    """
    alone = (run / "metrics.json").exists()
    folders = [folder for folder in run.glob("*") if folder.name.isdigit()]
    seeds = [run] if alone else sorted(folders, key=lambda folder: int(folder.name))
    finished = []
    for folder in seeds:
        record = read_run(folder)
        if "objective" in record:
            raise InputError(f"{folder}: is a pretraining, which predicts no property; {WANTED}")
        if record["status"] == "finished":
            finished.append(folder)
        else:
            log.warning("%s: %s, %s; left out", folder, record["status"], record.get("reason"))
    if not finished:
        raise InputError(f"{run}: no finished run is here; {WANTED}")
    for folder in finished[1:]:
        if made_from(folder) != made_from(finished[0]):
            raise InputError(
                f"{folder}: has other settings or data than {finished[0]}; remove what an earlier"
                " configuration left, or give the folder of one seed"
            )
    warn_of_versions(finished[0])
    return finished


def warn_of_versions(run: Path) -> None:
    """Say where packages are not those that the run was trained with; elements' features come from some."""
    trained, here = read_run(run).get("versions", {}), package_versions()
    if other := [name for name in PACKAGES if trained.get(name) != here.get(name)]:
        told = ", ".join(f"{name} {trained.get(name)}, here {here.get(name)}" for name in other)
        log.warning("%s: trained with %s; predictions may differ", run, told)


def made_from(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and data of a run, but for its seed."""
    return read_config(run) | {"seed": None}, read_run(run)["inputs"]


def predict_runs(
    runs: list[Path], config: dict[str, Any], folder: Path, results: Path, encoder: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n,) of the crystals in the caches that have a graph, and predictions (runs, n) in unit."""
    training = usable(config["training"])
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


def usable(training: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training, for one device that is here."""
    if training["device"] == "cuda" and not torch.cuda.is_available():
        log.warning("the run had a GPU, and there is none here; predictions may differ in their last digits")
        return training | ONE_DEVICE | {"device": "cpu"}
    return training | ONE_DEVICE
