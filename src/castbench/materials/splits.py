"""Train, validation and test: one assignment of materials for all targets, as id files with a checksum."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.provenance import sha256_file, sha256_json, write_json

log = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
FEWEST = 20  # crystals; a target with fewer is not trained


def split_materials(settings: dict[str, Any], materials: Path, output: Path) -> None:
    """Assign every material to train, validation or test, and write what each target has of them.

    A material is on the same side for every target, so that pretraining on the union of the train lists has
    seen no test crystal of any target. The assignment depends on the seed and the materials, not their order.

    Args:
        settings: `targets`, `seed`, `fractions` (three, summing to 1), and `group_by` (null, "formula" or
            "prototype": materials that share it stay together).
        materials: table of filter_materials.
        output: folder; `{target}.json` is written for each target.

    Raises:
        InputError: fractions or grouping make no sense.
    """
    fractions, group_by = [float(f) for f in settings["fractions"]], settings.get("group_by")
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(
            f"materials.split.fractions: {fractions} are not three positive shares that sum to 1"
        )
    ids, groups, wanted = read_members(materials, group_by)
    units: dict[str, list[int]] = {}
    for i in np.argsort(np.asarray(ids, dtype=object), kind="stable").tolist():
        units.setdefault(groups[i] if group_by else ids[i], []).append(i)
    targets: list[str] = settings["targets"]
    members = [{t for t in targets if t in wanted[i]} for i in range(len(ids))]
    counts = np.array([[sum(t in members[i] for i in unit) for t in targets] for unit in units.values()])
    part_of_unit = assign(counts, fractions, settings["seed"])
    made_of = {"materials_sha256": sha256_file(materials)}  # so that a corrected label is seen
    part_of = {i: part for unit, part in zip(units.values(), part_of_unit, strict=True) for i in unit}
    for target in targets:
        lists: dict[str, list[str]] = {part: [] for part in PARTS}
        for i in range(len(ids)):
            if target in members[i]:
                lists[PARTS[part_of[i]]].append(ids[i])
        reason = too_few(lists, group_by)
        if reason:
            log.warning("%s: %s; skipped", target, reason)
        header = {"target": target, "seed": settings["seed"], "fractions": fractions, "group_by": group_by}
        write_split(output / f"{target}.json", header | made_of, lists, reason)


def read_members(materials: Path, group_by: str | None) -> tuple[list[str], list[str], list[list[str]]]:
    """Read ids, the groups they belong to (empty where ungrouped), and the targets they qualify for."""
    if group_by not in (None, "formula", "prototype"):
        raise InputError(f"materials.split.group_by: {group_by!r} is not null, formula or prototype")
    ids: list[str] = []
    groups: list[str] = []
    targets: list[list[str]] = []
    column = {None: [], "formula": ["formula"], "prototype": ["structure"]}[group_by]
    with pq.ParquetFile(materials) as source:
        for group in range(source.num_row_groups):
            table = source.read_row_group(group, columns=["material_id", "targets", *column])
            ids += table.column("material_id").to_pylist()
            targets += table.column("targets").to_pylist()
            if group_by == "formula":
                groups += table.column("formula").to_pylist()
            elif group_by == "prototype":
                # Imports pymatgen: a second, which those who only read a split need not spend.
                from castbench.materials.structures import prototype, unpack_crystals

                groups += [prototype(crystal) for crystal in unpack_crystals(table.column("structure"))]
    return ids, groups, targets


def assign(counts: np.ndarray, fractions: Sequence[float], seed: int) -> list[int]:
    """Assign units to parts so that each target is shared out by `fractions`.

    Iterative stratification (Sechidis et al., ECML PKDD 2011): beginning with the rarest target, its units go
    one by one, in random order, to the part that lacks most of that target. No part of the rarest target is
    off by more than the largest unit, nor of the others unless the rarer ones filled it already.

    Args:
        counts: (units, targets) how many materials a unit has for each target.
        fractions: share of each part.
        seed: of the random order.

    Returns:
        Part of each unit.
    """
    order = np.random.default_rng(seed).permutation(len(counts))
    totals = counts.sum(axis=0)
    lacking = [[fraction * total for total in totals.tolist()] for fraction in fractions]
    part_of = [-1] * len(counts)
    rows = counts.tolist()
    for target in np.argsort(totals, kind="stable").tolist():
        for unit in order.tolist():
            if part_of[unit] >= 0 or not rows[unit][target]:
                continue
            part = max(range(len(fractions)), key=lambda p: lacking[p][target])
            part_of[unit] = part
            for t, count in enumerate(rows[unit]):
                lacking[part][t] -= count
    return part_of


def too_few(lists: Mapping[str, list[str]], group_by: str | None) -> str | None:
    """Why a target is not trained on, if it is not: it is too small, or a part is empty."""
    total = sum(map(len, lists.values()))
    if total < FEWEST:
        return f"{total} crystals, and {FEWEST} are the fewest to train on"
    if empty := [part for part in PARTS if not lists[part]]:
        groups = f" in too few groups by {group_by}" if group_by else ""
        return f"{total} crystals{groups} leave {empty[0]} empty; change materials.split"
    return None


def write_split(
    path: Path, header: Mapping[str, Any], lists: Mapping[str, list[str]], reason: str | None = None
) -> None:
    """Write a split: `header`, status, the ids of each part, sorted, and their checksum.

    Where there is a `reason` not to train on it, the lists are written empty.
    """
    ids = {part: [] if reason else sorted(lists[part]) for part in PARTS}
    status = {"status": "too_few" if reason else "ok", "reason": reason}
    write_json(path, {**header, **status, **ids, "checksum": checksum(ids)})


def checksum(split: Mapping[str, Any]) -> str:
    """SHA-256 of the three id lists."""
    return sha256_json([split[part] for part in PARTS])


def load_split(path: Path) -> dict[str, Any]:
    """Read a split and verify its checksum.

    Raises:
        InputError: it is missing, no split, or its lists are not those that were written.
    """
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        intact = split["checksum"] == checksum(split)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a split ({error!r}); delete it and run split_materials again"
        ) from None
    if not intact:
        raise InputError(
            f"{path}: its ids are not those of its checksum; delete it and run split_materials again"
        )
    return split
