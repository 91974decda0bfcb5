"""Collecting materials: the sources, and the checks that every record of any source passes."""

import logging
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.materials.matbench import open_matbench
from castbench.materials.materials_project import download, open_materials_project
from castbench.materials.readers import BATCH, Source, fingerprint, read_records
from castbench.materials.records import (
    LABELS,
    Columns,
    Material,
    make_schema,
    to_table,
    what_is_possible,
)
from castbench.materials.structures import RecordError
from castbench.provenance import atomic_path, write_json

log = logging.getLogger(__name__)
LISTED = 1_000  # rejected records that the manifest names; all are counted, and all are logged


def open_demo(settings: Mapping[str, Any]) -> Source:
    """The bundled crystals, whose labels this project computed."""
    path = source_path(settings)
    return Source(
        origin="demo",
        records=read_records(path),
        columns={},
        files=[fingerprint(path)],
        licence="CC0-1.0",
        citation="castbench demo crystals (GPAW, PBE), workflow/resources/demo/README.md",
    )


def open_local(settings: Mapping[str, Any]) -> Source:
    """A file or folder of the user's own."""
    path = source_path(settings)
    return Source(
        origin=f"local:{path.name}",
        records=read_records(path),
        columns=settings.get("columns") or {},
        files=[fingerprint(path)],
    )


def source_path(settings: Mapping[str, Any]) -> Path:
    """The file or folder to read, which must exist."""
    if not settings.get("path"):
        raise InputError("materials.path: is not set; name the file or folder of your crystals")
    path = Path(settings["path"])
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; correct materials.path")
    return path


# A new source is a function of the settings and a line here.
SOURCES: dict[str, Callable[[Mapping[str, Any]], Source]] = {
    "demo": open_demo,
    "local": open_local,
    "materials_project": open_materials_project,
    "matbench": open_matbench,
}


@dataclass
class Tally:
    """What became of the records."""

    read: int = 0
    kept: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, str]] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    invalid: Counter[str] = field(default_factory=Counter)

    def keep(self, name: str, labels: Mapping[str, float | None], invalid: Mapping[str, Any]) -> None:
        """Count what is kept and the labels that it lacks; a column's first impossible one gets a line."""
        self.kept += 1
        self.missing.update(label for label, value in labels.items() if value is None)
        for label, given in invalid.items():
            if not self.invalid[label]:
                log.warning(
                    "%s: %s is %s, and not %s; taken as missing, like others of its kind",
                    name, label, repr(given)[:40], what_is_possible(label),
                )  # fmt: skip
            self.invalid[label] += 1

    def reject(self, name: str, error: RecordError) -> None:
        """Count a record that is left out, and say so in one line."""
        log.warning("%s: %s (%s); left out", name, error.reason, error.detail)
        self.by_reason[error.reason] += 1
        if len(self.rejected) < LISTED:
            self.rejected.append({"record": name, "reason": error.reason, "detail": error.detail})

    def reasons(self) -> str:
        """What records were left out for, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())

    def account(self, settings: Mapping[str, Any], source: Source) -> dict[str, Any]:
        """What a manifest says of a source and its records."""
        return {
            "source": settings["source"],
            "files": source.files,
            "columns": dict(source.columns),
            "n_read": self.read,
            "n_kept": self.kept,
            "rejected": self.rejected,
            "by_reason": dict(self.by_reason),
            "licence": source.licence,
            "citation": source.citation,
        }


def collect_materials(
    settings: dict[str, Any], output: Path, manifest: Path, snapshot: Path | None = None
) -> None:
    """Read a source, check every record, and write the good ones and an account of all.

    Args:
        settings: what the source needs of the configuration: `source`, and `path` and `columns`, or
            `snapshot`, `database_version` and `descriptions`, or `files`.
        output: Parquet file to write, in the order of the source, in row groups of 1,000.
        manifest: JSON file to write: files with hashes, counts, rejected records by reason, labels by column.
        snapshot: where a download from the Materials Project is archived; beside the output if not given.
            Its pages lie in `pages` beside the output until all is written.

    Raises:
        InputError: the source cannot be read or reached, its mapping does not fit, or no record is usable.
    """
    pages = output.with_name("pages")
    live = settings["source"] == "materials_project" and not settings.get("snapshot")
    if live:
        snapshot = snapshot or output.with_name("snapshot.jsonl.zst")
        download(settings, snapshot, pages)
        settings = settings | {"snapshot": str(snapshot)}
    elif snapshot:
        raise InputError(f"--snapshot {snapshot}: archives a download, and these settings need none; drop it")
    source = SOURCES[settings["source"]](settings)
    columns, tally = Columns(source.columns, source.labels or tuple(LABELS)), Tally()
    materials = check_records(source, columns, tally)
    with atomic_path(output) as partial:
        with pq.ParquetWriter(partial, make_schema(columns.labels), compression="zstd") as writer:
            while batch := list(islice(materials, BATCH)):
                writer.write_table(to_table(batch))
        if not tally.read:
            raise InputError(f"{source.origin}: has no records; check materials.path")
        if not tally.kept:
            raise InputError(
                f"{source.origin}: no record is usable ({tally.reasons()}); see the warnings above"
            )
        columns.check_found()
    write_json(
        manifest,
        {
            **tally.account(settings, source),
            "labels": {
                label: {
                    "present": tally.kept - tally.missing[label],
                    "missing": tally.missing[label],
                    "invalid": tally.invalid[label],  # among the missing
                }
                for label in columns.labels
            },
            **({"download": source.download} if source.download else {}),
        },
    )
    if live:
        shutil.rmtree(pages)
    log.info("%s: kept %d of %d records", source.origin, tally.kept, tally.read)


def check_records(source: Source, columns: Columns, tally: Tally) -> Iterator[Material]:
    """Iterate over the usable materials of a source; the others are counted. Of equal ids the first stays."""
    seen = Seen()
    for name, record in source.records:
        tally.read += 1
        try:
            if isinstance(record, RecordError):
                raise record
            material = columns.read(record, name, source.origin)
            digest = material.digest()
            known = seen.add(material.material_id, digest)
            if known == digest:
                raise RecordError("repeated record", f"{material.material_id} is there already, the same")
            if known:
                raise RecordError(
                    "duplicate id", f"another crystal or label is called {material.material_id}"
                )
        except RecordError as error:
            identifier = None if isinstance(record, RecordError) else columns.get(record, "material_id")
            tally.reject(f"{identifier} ({name})" if identifier else name, error)
            continue
        tally.keep(name, material.labels, material.invalid)
        yield material


class Seen:
    """The ids so far with their digests, in a temporary database: memory does not grow with them."""

    def __init__(self) -> None:
        # On disk where it outgrows its cache, and gone when closed.
        self.database = sqlite3.connect("", isolation_level=None)
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, digest BLOB) WITHOUT ROWID")

    def add(self, identifier: str, digest: bytes) -> bytes | None:
        """Add an id; returns its digest if it was there already."""
        found = self.database.execute("SELECT digest FROM seen WHERE id = ?", (identifier,)).fetchone()
        if found:
            return found[0]
        self.database.execute("INSERT INTO seen VALUES (?, ?)", (identifier, digest))
        return None
