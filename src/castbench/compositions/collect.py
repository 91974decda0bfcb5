"""Collecting compositions: the ABX3 compounds of a source by polymorph, then by formula."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pymatgen.core import Composition

from castbench.compositions.formulas import check_slots, is_abx3, parse_formula
from castbench.errors import InputError
from castbench.materials.readers import BATCH, Source
from castbench.materials.records import LABELS, STRUCTURE, Columns, is_missing, what_is_possible
from castbench.materials.sources import SOURCES, Seen, Tally
from castbench.materials.structures import RecordError, read_crystal
from castbench.provenance import atomic_path, write_json

log = logging.getLogger(__name__)
READ = ("energy_above_hull", "band_gap", "formation_energy_per_atom")
OTHER_LABELS = {name: paths for name, paths in LABELS.items() if name not in READ}
POLYMORPHS = pa.schema(
    [("formula", pa.string()), ("material_id", pa.string()), *((label, pa.float64()) for label in READ)]
)
COMPOSITIONS = POLYMORPHS.append(pa.field("n_polymorphs", pa.int32()))


def collect_compositions(settings: dict[str, Any], output: Path, manifest: Path) -> None:
    """Read a source and keep its ABX3 compounds that have an energy above hull.

    Args:
        settings: what the source needs, as for collect_materials (of the Materials Project, a snapshot), and
            `max_elements`.
        output: Parquet file to write, one row a polymorph, energies in eV/atom and gaps in eV.
        manifest: JSON file to write: files with hashes, records read and kept, those left out by reason.

    Raises:
        InputError: the source cannot be read, its mapping does not fit, or it has no such compound.
    """
    source = SOURCES[settings["source"]](settings)
    columns, tally = Columns(source.columns), Tally()
    rows = read_rows(source, columns, tally, settings["max_elements"])
    with atomic_path(output) as partial:
        with pq.ParquetWriter(partial, POLYMORPHS, compression="zstd") as writer:
            while batch := list(islice(rows, BATCH)):
                writer.write_table(pa.Table.from_pylist(batch, schema=POLYMORPHS))
        if not tally.kept:
            raise InputError(
                f"{source.origin}: no ABX3 compound with an energy above hull "
                f"({tally.reasons() or 'no records'}); check materials.path and materials.columns"
            )
        columns.check_found(unread=STRUCTURE | OTHER_LABELS | {"text": (), "origin": ()})
    write_json(
        manifest,
        {
            **tally.account(settings, source),
            "missing": {label: tally.missing[label] for label in READ},
            "invalid": {label: tally.invalid[label] for label in READ},  # among the missing
        },
    )
    log.info("%s: %d ABX3 compounds of %d records", source.origin, tally.kept, tally.read)


def read_rows(source: Source, columns: Columns, tally: Tally, max_elements: int) -> Iterator[dict[str, Any]]:
    """Iterate over the usable rows of a source; what is left out is counted, what is wrong also logged."""
    seen = Seen()
    for name, record in source.records:
        tally.read += 1
        identifier = None
        try:
            if isinstance(record, RecordError):
                raise record
            given = columns.get(record, "material_id")
            identifier = None if given is None else str(given).strip()
            composition = read_composition(record, columns)
            if not is_abx3(composition):  # no mistake of the record's
                tally.by_reason["not ABX3"] += 1
                continue
            check_slots(composition, max_elements)
            labels, invalid = columns.read_labels(record, READ)
            if "energy_above_hull" in invalid:
                given, possible = invalid["energy_above_hull"], what_is_possible("energy_above_hull")
                raise RecordError("impossible energy above hull", f"{repr(given)[:40]}, and not {possible}")
            if labels["energy_above_hull"] is None:
                raise RecordError(
                    "no energy above hull", f"{composition.reduced_formula}: neither stable nor not"
                )
            identifier = identifier or name.replace(":", "-")
            if seen.add(identifier, b"") is not None:
                raise RecordError("duplicate id", f"another record is called {identifier}")
        except RecordError as error:
            tally.reject(f"{identifier} ({name})" if identifier else name, error)
            continue
        tally.keep(name, labels, invalid)
        yield {"formula": composition.reduced_formula, "material_id": identifier, **labels}


def read_composition(record: Mapping[str, Any], columns: Columns) -> Composition:
    """Composition of a record: from its formula, its atomic fractions, or its structure."""
    for column in ("formula", "fractions"):
        given = columns.get(record, column)
        if not is_missing(given):
            return parse_formula(given)
    parts = {part: columns.get(record, part) for part in STRUCTURE}
    if not any(value is not None for value in parts.values()):
        raise RecordError("missing formula", "it has no formula, no fractions and no structure")
    return parse_formula(read_crystal(parts).formula)


def aggregate_compositions(polymorphs: Path, output: Path) -> None:
    """Make one row a formula: its polymorph of lowest energy above hull, with that one's gap.

    A formula is the model's whole input, so polymorphs would be equal inputs with different answers; and it
    is stable if any of its polymorphs is. Of polymorphs of one energy, that of the first id is taken.

    Args:
        polymorphs: table of collect_compositions.
        output: Parquet file to write, sorted by formula, with the number of polymorphs.
    """
    lowest: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    with pq.ParquetFile(polymorphs) as table:
        for batch in table.iter_batches(BATCH):
            for row in batch.to_pylist():
                counts[row["formula"]] += 1
                known = lowest.get(row["formula"])
                if known is None or _order(row) < _order(known):
                    lowest[row["formula"]] = row
    rows = [lowest[formula] | {"n_polymorphs": counts[formula]} for formula in sorted(lowest)]
    with atomic_path(output) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=COMPOSITIONS), partial, compression="zstd")
    log.info("%d formulas of %d polymorphs", len(rows), counts.total())


def _order(row: Mapping[str, Any]) -> tuple[float, str]:
    return row["energy_above_hull"], row["material_id"]
