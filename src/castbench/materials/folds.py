"""The folds of Matbench: the ones that it published, as splits of ours."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.model_selection import KFold, StratifiedKFold

from castbench.errors import InputError
from castbench.labels import FOLDS, MATBENCH, fold_name
from castbench.materials.matbench import make_ids, published, read_values
from castbench.materials.splits import write_split
from castbench.provenance import atomic_path, sha256_file, sha256_json

log = logging.getLogger(__name__)
RANDOM_STATE = 18012019  # Matbench's
KNOWN = Path(__file__).resolve().parents[3] / "workflow" / "resources" / "matbench_folds.csv"


def split_matbench(settings: dict[str, Any], materials: Path, output: Path, tasks: Path) -> None:
    """Write Matbench's folds of every task: a split for each, and a table of all records.

    A record that is not among the materials, because its structure could not be used, is in no list, but in
    the table: Matbench wants a prediction for it too.

    Args:
        settings: `files` ({task: file}); `validation`, the share of a training fold that is set aside for
            validation, drawn by `seed`; 0 sets none aside.
        materials: table of filter_materials.
        output: folder; `{task}.fold_{k}.json` is written for each fold.
        tasks: folder; `{task}.parquet` is written for each task: material_id, value in the task's unit, and
            the fold (0 to 4) in which the record is for testing.

    Raises:
        InputError: a file cannot be read, or its folds are not those that Matbench published.
    """
    made_of = sha256_file(materials)
    usable = set(pq.read_table(materials, columns=["material_id"]).column(0).to_pylist())
    for task, name in settings["files"].items():
        path = Path(name)
        values = np.array(read_values(path))
        ids = np.array(list(make_ids(task, len(values))))
        fold = make_folds(values, MATBENCH[task].task == "classification", path)
        if sha256_file(path) == published(task).sha256:
            check_published(task, ids, fold)
        table = pa.table({"material_id": ids, "value": values, "fold": pa.array(fold, pa.int8())})
        with atomic_path(tasks / f"{task}.parquet") as partial:
            pq.write_table(table, partial, compression="zstd")
        kept = np.array([name in usable for name in ids.tolist()])
        if not kept.all():
            log.warning(
                "%s: %d records have no usable structure, and are not trained on", task, (~kept).sum()
            )
        for k in range(FOLDS):
            lists = {"test": ids[(fold == k) & kept], "train": ids[(fold != k) & kept]}
            order = np.random.default_rng([settings["seed"], k]).permutation(len(lists["train"]))
            aside = order[: round(settings["validation"] * len(order))]
            lists["validation"] = lists["train"][aside]
            lists["train"] = np.delete(lists["train"], aside)
            empty = [part for part in ("train", "test") if not len(lists[part])]  # validation may be
            header = {"target": fold_name(task, k), "task": task, "fold": k, "seed": settings["seed"]}
            header["materials_sha256"] = made_of
            write_split(
                output / f"{fold_name(task, k)}.json",
                header | {"validation_share": settings["validation"]},
                {part: names.tolist() for part, names in lists.items()},
                f"no crystal is left in {empty[0]}" if empty else None,
            )


def make_folds(values: np.ndarray, classes: bool, path: Path) -> np.ndarray:
    """The fold (n,) in which each record is for testing: scikit-learn's, with Matbench's seed.

    Args:
        values: (n,) of the target.
        classes: whether they are classes, which each fold has in the same proportion.
        path: of the file, for the error.

    Raises:
        InputError: there are fewer records than folds.
    """
    kind = StratifiedKFold if classes else KFold
    fold = np.full(len(values), -1)
    try:
        parts = kind(FOLDS, shuffle=True, random_state=RANDOM_STATE).split(values, values)
        for k, (_, test) in enumerate(parts):
            fold[test] = k
    except ValueError as error:
        raise InputError(f"{path}: {len(values)} records do not make {FOLDS} folds ({error})") from None
    return fold


def check_published(task: str, ids: np.ndarray, fold: np.ndarray) -> None:
    """Compare the test lists with the checksum of those in Matbench's validation file.

    Raises:
        InputError: they differ.
    """
    with KNOWN.open(encoding="utf-8", newline="") as file:
        known = {row["task"]: row["sha256"] for row in csv.DictReader(file)}
    if sha256_json([ids[fold == k].tolist() for k in range(FOLDS)]) != known[task]:
        raise InputError(
            f"{task}: its folds are not those that Matbench published; scikit-learn shuffles otherwise than "
            "it did, use the version of requirements.lock"
        )
