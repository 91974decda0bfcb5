"""The filters of the CAST paper (section 2.1), each named and switchable, and counted in a funnel."""

import hashlib
import heapq
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pymatgen.core import Composition

from castbench.compositions.formulas import is_abx3
from castbench.errors import InputError
from castbench.labels import TARGET_ORDER, TARGETS
from castbench.materials.targets import column_values, target_values
from castbench.provenance import atomic_path, sha256_file, write_json

log = logging.getLogger(__name__)
NOBLE_GASES = ("He", "Ne", "Ar", "Kr", "Xe", "Rn", "Og")
ALL = tuple(TARGETS)
NO_VALUE = "no value"  # the filter of crystals without the target
MODULI = ("k_voigt", "k_reuss", "k_vrh", "g_voigt", "g_reuss", "g_vrh")
MODULUS_TARGETS = tuple(name for name in TARGET_ORDER if TARGETS[name].column in MODULI)
ROUNDING = 1e-6  # GPa; in a cubic crystal the three averages of K are one number, up to rounding


@dataclass(frozen=True)
class Filter:
    """A step of the funnel.

    Attributes:
        name: the key of the configuration that switches it, or in words what the key implies.
        applies_to: targets that lose what it removes.
        removes: mask (n,) over a table's rows; it is asked once for each target.
    """

    name: str
    applies_to: tuple[str, ...]
    removes: Callable[[pa.Table, str], np.ndarray]


def paper_filters(settings: Mapping[str, Any]) -> Iterator[Filter]:
    """List the filters that are on, in the order in which they are applied.

    The readings of what the paper leaves open or inverts (workflow/resources/deviations.yaml): energies are
    per atom; the second bound on the formation energy is a lower one; the rules for moduli concern their
    targets alone; Reuss <= VRH <= Voigt is not strict, because cubic crystals have one bulk modulus, unless
    `ordered_moduli` is "strict". A missing energy qualifies for nothing where a filter asks for it, a missing
    modulus breaks no rule but the strict one, and a missing value of the target itself costs that target.
    """
    low, high = settings.get("min_formation_energy"), settings.get("max_formation_energy")
    hull, modulus = settings.get("max_energy_above_hull"), settings.get("max_modulus")
    if low is not None or high is not None:
        yield Filter("no formation energy", ALL, is_null("formation_energy_per_atom"))
    if high is not None:
        yield Filter("max_formation_energy", ALL, above("formation_energy_per_atom", high))
    if low is not None:
        yield Filter("min_formation_energy", ALL, below("formation_energy_per_atom", low))
    if hull is not None:
        yield Filter("no energy above hull", ALL, is_null("energy_above_hull"))
        yield Filter("max_energy_above_hull", ALL, above("energy_above_hull", hull))
    if settings.get("abx3"):
        yield Filter("abx3", ALL, is_not_abx3)
    if settings.get("exclude_noble_gases"):
        yield Filter("exclude_noble_gases", ALL, has_noble_gas)
    yield Filter(NO_VALUE, ALL, lambda table, t: np.isnan(column_values(table, TARGETS[t].column)))
    if settings.get("exclude_metals"):
        yield Filter("exclude_metals", ("band_gap",), lambda table, _: column_values(table, "band_gap") <= 0)
    if settings.get("positive_moduli"):
        yield Filter("positive_moduli", MODULUS_TARGETS, any_modulus(lambda values: values <= 0))
    if settings.get("ordered_moduli"):
        broken = breaks_strict_order if settings["ordered_moduli"] == "strict" else breaks_order
        yield Filter("ordered_moduli", MODULUS_TARGETS, broken)
    if modulus is not None:
        yield Filter("max_modulus", MODULUS_TARGETS, any_modulus(lambda values: values > modulus))
    yield Filter(
        "no logarithm", MODULUS_TARGETS, lambda table, target: np.isnan(target_values(table, target))
    )


def outside_sample(materials: Path, size: int, seed: int) -> Callable[[pa.Table, str], np.ndarray]:
    """Mask of rows that a random sample of `size` materials leaves out.

    The sample depends on the ids and the seed, not on the order; a larger one includes a smaller one.
    """
    ids = pq.read_table(materials, columns=["material_id"]).column(0).to_pylist()
    drawn = heapq.nsmallest(size, ids, key=lambda name: hashlib.blake2b(f"{seed} {name}".encode()).digest())
    chosen = pa.array(drawn, pa.string())
    return lambda table, _: ~pc.is_in(table.column("material_id"), chosen).to_numpy()


def is_not_abx3(table: pa.Table, _: str) -> np.ndarray:
    """Mask of rows whose formula is no perovskite's."""
    formulas = table.column("formula").to_pylist()
    return np.array([not is_abx3(Composition(formula)) for formula in formulas], dtype=bool)


def is_null(column: str) -> Callable[[pa.Table, str], np.ndarray]:
    """Mask of rows where `column` is null."""
    return lambda table, _: np.isnan(column_values(table, column))


def above(column: str, limit: float) -> Callable[[pa.Table, str], np.ndarray]:
    """Mask of rows where `column` exceeds `limit`, in its unit."""
    return lambda table, _: column_values(table, column) > limit


def below(column: str, limit: float) -> Callable[[pa.Table, str], np.ndarray]:
    """Mask of rows where `column` is less than `limit`, in its unit."""
    return lambda table, _: column_values(table, column) < limit


def any_modulus(breaks: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table, str], np.ndarray]:
    """Mask of rows where one of the six moduli (GPa) `breaks` a rule; null breaks none."""
    return lambda table, _: np.any([breaks(column_values(table, name)) for name in MODULI], axis=0)


def breaks_order(table: pa.Table, _: str) -> np.ndarray:
    """Mask of rows where Reuss <= VRH <= Voigt fails for K or G: the bounds on a polycrystal's modulus."""
    return np.any([low > high + ROUNDING for low, high in bounds(table)], axis=0)


def breaks_strict_order(table: pa.Table, _: str) -> np.ndarray:
    """Mask of rows without Reuss < VRH < Voigt for both K and G; one that is null does not satisfy it."""
    return ~np.all([low < high - ROUNDING for low, high in bounds(table)], axis=0)


def bounds(table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of averages of K and of G (GPa), the first of which bounds the second from below."""
    for letter in "kg":
        reuss, vrh, voigt = (column_values(table, f"{letter}_{kind}") for kind in ("reuss", "vrh", "voigt"))
        yield from ((reuss, vrh), (vrh, voigt), (reuss, voigt))


def has_noble_gas(table: pa.Table, _: str) -> np.ndarray:
    """Mask of rows whose crystal has a noble gas."""
    mask = np.zeros(len(table), dtype=bool)
    row = 0
    for chunk in table.column("structure").chunks:
        species = chunk.field("species")
        offsets = species.offsets.to_numpy() - species.offsets[0].as_py()
        noble = pc.is_in(species.flatten(), pa.array(NOBLE_GASES)).to_numpy(zero_copy_only=False)
        before = np.concatenate([[0], np.cumsum(noble)])
        mask[row : row + len(chunk)] = before[offsets[1:]] > before[offsets[:-1]]
        row += len(chunk)
    return mask


def filter_materials(
    settings: dict[str, Any], materials: Path, manifest: Path, output: Path, funnel: Path
) -> None:
    """Keep the materials that qualify for a target, and say for which; count what every filter removes.

    Streams by row group, so memory does not grow with the table.

    Args:
        settings: `filters` and `targets` of the configuration; `sample` and `seed` to draw some first.
        materials: table of collect_materials.
        manifest: its manifest; its rejected records open the funnel.
        output: Parquet file to write: the same columns and order, and `targets`.
        funnel: JSON file to write.

    Raises:
        InputError: no material is left.
    """
    targets: list[str] = settings["targets"]
    steps = list(paper_filters(settings["filters"]))
    if settings.get("sample") is not None:
        steps.insert(
            0, Filter("sample", ALL, outside_sample(materials, settings["sample"], settings["seed"]))
        )
    filters = [
        Filter(step.name, applies_to, step.removes)
        for step in steps
        if (applies_to := tuple(name for name in targets if name in step.applies_to))
    ]
    account = json.loads(manifest.read_text(encoding="utf-8"))
    counts = Counts(targets, filters)
    with atomic_path(output) as partial, pq.ParquetFile(materials) as source:
        schema = source.schema_arrow.append(pa.field("targets", pa.list_(pa.string())))
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                qualifies = counts.apply(table)
                kept = qualifies.any(axis=1)
                names = pack_targets(targets, qualifies[kept])
                if kept.any():
                    writer.write_table(
                        table.filter(pa.array(kept)).append_column(schema.field("targets"), names)
                    )
        if not counts.left_any:
            name, removed = counts.harshest()
            advice = "switch that filter off in materials.filters, or map the column that it needs"
            if name == NO_VALUE:
                wanted = ", ".join(TARGETS[target].column for target in targets)
                advice = f"map one of {wanted} in materials.columns; CIF files need labels.csv"
            fell = f"{removed} of {counts.collected} fell to {name!r}"
            raise InputError(f"{materials}: no material is left; {fell}; {advice}")
    # The hash is for the jobs that wait for this small file: counts stay when a label or a cell is corrected.
    made = {"rejected_by_reason": account["by_reason"], "materials_sha256": sha256_file(output)}
    write_json(funnel, counts.funnel() | made)
    log.info("%d of %d materials qualify for a target", counts.left_any, counts.collected)


class Counts:
    """The funnel as it fills: what every filter removes and leaves, for materials and for each target."""

    def __init__(self, targets: Sequence[str], filters: Sequence[Filter]) -> None:
        self.targets, self.filters = list(targets), list(filters)
        self.collected = 0
        self.left_any = 0
        self.removed = np.zeros((len(filters), len(targets)), dtype=np.int64)
        self.left = np.zeros((len(filters), len(targets)), dtype=np.int64)
        self.removed_any = np.zeros(len(filters), dtype=np.int64)
        self.left_some = np.zeros(len(filters), dtype=np.int64)

    def apply(self, table: pa.Table) -> np.ndarray:
        """Filter some rows; count. Returns the mask (n, targets) of what qualifies for what."""
        qualifies = np.ones((len(table), len(self.targets)), dtype=bool)
        self.collected += len(table)
        for i, step in enumerate(self.filters):
            columns = [self.targets.index(name) for name in step.applies_to]
            before = qualifies.sum(axis=0)
            material_before = qualifies[:, columns].any(axis=1).sum()
            for column, name in zip(columns, step.applies_to, strict=True):
                qualifies[:, column] &= ~step.removes(table, name)
            material_left = qualifies[:, columns].any(axis=1).sum()
            self.removed[i] += before - qualifies.sum(axis=0)
            self.left[i] += qualifies.sum(axis=0)
            self.removed_any[i] += material_before - material_left
            self.left_some[i] += material_left
        self.left_any += int(qualifies.any(axis=1).sum())
        return qualifies

    def harshest(self) -> tuple[str, int]:
        """Name the filter that removes most materials, and how many."""
        worst = int(self.removed_any.argmax())
        return self.filters[worst].name, int(self.removed_any[worst])

    def funnel(self) -> dict[str, Any]:
        """The funnel as JSON.

        In `steps`, a material is removed when it qualifies for none of the filter's targets any more.
        """
        steps = [
            {
                "filter": step.name,
                "applies_to": list(step.applies_to),
                "removed": int(self.removed_any[i]),
                "left": int(self.left_some[i]),
            }
            for i, step in enumerate(self.filters)
        ]
        by_target = {}
        for column, target in enumerate(self.targets):
            own = [
                {
                    "filter": step.name,
                    "removed": int(self.removed[i, column]),
                    "left": int(self.left[i, column]),
                }
                for i, step in enumerate(self.filters)
                if target in step.applies_to
            ]
            by_target[target] = {"steps": own, "n": own[-1]["left"]}
        return {"n_collected": self.collected, "n_kept": self.left_any, "steps": steps, "targets": by_target}


def pack_targets(targets: Sequence[str], qualifies: np.ndarray) -> pa.ListArray:
    """The `targets` column from a mask (n, targets)."""
    offsets = np.concatenate([[0], qualifies.sum(axis=1).cumsum()]).astype(np.int32)
    names = np.asarray(targets, dtype=object)[np.nonzero(qualifies)[1]]
    return pa.ListArray.from_arrays(offsets, pa.array(names, pa.string()))
