"""Train, validation and test of formulas, and what a split by rows would leak."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from castbench.compositions.targets import class_values, composition_values, threshold_text
from castbench.errors import InputError
from castbench.labels import CLASS_TARGETS, TARGETS
from castbench.materials.splits import PARTS, assign, checksum, load_split, write_split
from castbench.provenance import sha256_file, write_json

log = logging.getLogger(__name__)
FEWEST = 10  # formulas


def split_compositions(settings: dict[str, Any], polymorphs: Path, compositions: Path, output: Path) -> None:
    """Assign every formula to train, validation or test, stratified by stability.

    Args:
        settings: `seed`, `fractions` (three, summing to 1), `regression`, targets that every part must have,
            and `classification`, which has the threshold of `stability` (eV/atom).
        polymorphs: table of collect_compositions, for the leakage of a split by rows.
        compositions: table of aggregate_compositions.
        output: JSON file to write: formulas of each part, sorted, with a checksum.

    Raises:
        InputError: too few formulas, all of one class, or a part without a value of a target.
    """
    table = pq.read_table(compositions)
    formulas = table["formula"].to_pylist()
    threshold, seed = settings["classification"]["stability"], settings["seed"]
    stable = class_values(table, "stability", threshold)
    target = CLASS_TARGETS["stability"]
    if len(formulas) < FEWEST:
        raise InputError(
            f"{compositions}: {len(formulas)} ABX3 formulas, and {FEWEST} are the fewest to split"
        )
    if len(set(stable.tolist())) < 2:
        only = target.positive if stable[0] else target.negative
        raise InputError(
            f"{compositions}: all {len(formulas)} formulas are {only} (energy above hull at or below "
            f"{threshold:g} eV/atom is stable); change compositions.classification.stability, or add others"
        )
    counts = np.stack([stable == 0, stable == 1], axis=1).astype(int)
    parts = assign(counts, settings["fractions"], seed)
    lists = {
        name: [formula for formula, part in zip(formulas, parts, strict=True) if PARTS[part] == name]
        for name in PARTS
    }
    if empty := [name for name in PARTS if not lists[name]]:
        raise InputError(
            f"{compositions}: {len(formulas)} formulas leave {empty[0]} empty; change the fractions"
        )
    for name, values in composition_values(table, settings["regression"], {}).items():
        known = {formula for formula, value in zip(formulas, values, strict=True) if np.isfinite(value)}
        if lacking := [part for part in PARTS if not known & set(lists[part])]:
            raise InputError(
                f"{compositions}: {len(known)} of {len(formulas)} formulas have a {name}, and none in "
                f"{lacking[0]}; map the column {TARGETS[name].column}, or change compositions.regression"
            )
    for name, cut in settings["classification"].items():
        in_train = class_values(table, name, cut)[np.isin(formulas, lists["train"])]
        if len(classes := set(in_train[np.isfinite(in_train)].tolist())) < 2:
            both = CLASS_TARGETS[name]
            only = both.positive if classes == {1.0} else both.negative if classes else "without a value"
            raise InputError(
                f"{compositions}: for training every formula is {only} ({threshold_text(name, cut)}); "
                f"change compositions.classification.{name}"
            )
    header = {"seed": seed, "fractions": settings["fractions"], "stability_threshold": threshold}
    by_class = {
        name: {target.positive: int(stable[chosen].sum()), target.negative: int((1 - stable[chosen]).sum())}
        for name in PARTS
        for chosen in [np.isin(formulas, lists[name])]
    }
    header |= {"classes": by_class, "by_rows": leakage(polymorphs, settings["fractions"], seed)}
    write_json(output, header | lists | {"reason": None, "checksum": checksum(lists)})
    log.info("formulas: %s", ", ".join(f"{name} {len(lists[name])}" for name in PARTS))


def split_structures(
    settings: dict[str, Any], materials: Path, compositions: Path, split: Path, output: Path
) -> None:
    """Give crystals the split of their formulas, so that models of structures see the same train and test.

    Of a formula only the polymorph that compositions.parquet has takes part.

    Args:
        settings: `targets`, `seed`, `fractions`.
        materials: table of filter_materials.
        compositions: table of aggregate_compositions.
        split: of split_compositions.
        output: folder; `{target}.json` is written for each target.
    """
    chosen = pq.read_table(compositions, columns=["formula", "material_id"])
    lists = load_split(split)
    part_of = {formula: part for part in PARTS for formula in lists[part]}
    part_of_id = {
        identifier: part_of[formula]
        for formula, identifier in zip(
            *(chosen[name].to_pylist() for name in chosen.column_names), strict=True
        )
        if formula in part_of
    }
    table = pq.read_table(materials, columns=["material_id", "targets"])
    members = list(zip(table["material_id"].to_pylist(), table["targets"].to_pylist(), strict=True))
    made_of = {"group_by": "composition", "materials_sha256": sha256_file(materials)}
    for target in settings["targets"]:
        ids: dict[str, list[str]] = {part: [] for part in PARTS}
        for identifier, targets in members:
            if identifier in part_of_id and target in targets:
                ids[part_of_id[identifier]].append(identifier)
        empty = [part for part in PARTS if not ids[part]]
        reason = f"no crystal of a formula in {empty[0]}" if empty else None
        if reason:
            log.warning("%s: %s; skipped", target, reason)
        header = {"target": target, "seed": settings["seed"], "fractions": settings["fractions"]}
        write_split(output / f"{target}.json", header | made_of, ids, reason)


def leakage(polymorphs: Path, fractions: list[float], seed: int) -> dict[str, Any]:
    """What a random split of rows, as in the report, would share between training and test.

    Returns:
        Rows of the test part, and how many of them have a formula that is also in training.
    """
    formulas = np.array(pq.read_table(polymorphs, columns=["formula"])["formula"].to_pylist())
    order = np.random.default_rng(seed).permutation(len(formulas))
    train = set(formulas[order[: round(fractions[0] * len(order))]].tolist())
    test = formulas[order[len(order) - round(fractions[2] * len(order)) :]].tolist()
    return {
        "n_rows": len(formulas),
        "n_test": len(test),
        "n_leaked": sum(formula in train for formula in test),
    }
