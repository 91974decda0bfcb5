"""Records from files, one at a time: JSON lines, CSV, Parquet, CIF files in a folder or an archive."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.materials.structures import RecordError
from castbench.provenance import sha256_file

Record = tuple[str, dict[str, Any] | RecordError]  # its name in messages, and what it says
BATCH = 1_000


@dataclass(frozen=True)
class Source:
    """Records, and where they come from.

    Attributes:
        origin: what the `origin` column says where the record does not.
        records: pairs of a name for messages and a record, or a RecordError in its place.
        columns: our column -> path in a record.
        files: entries of the manifest: path, bytes, sha256.
        download: entry of the manifest: what was asked of which database, and when.
        labels: its own columns of labels, in place of the common ones.
    """

    origin: str
    records: Iterable[Record]
    columns: Mapping[str, str]
    files: list[dict[str, Any]]
    licence: str | None = None
    citation: str | None = None
    download: dict[str, Any] | None = None
    labels: Sequence[str] | None = None


def read_records(path: Path) -> Iterator[Record]:
    """Iterate over the records of a file or folder, by the ending of its name.

    Raises:
        InputError: there is no such file, its kind is not known, or it is damaged.
    """
    reader = find_reader(path)
    try:
        yield from reader(path)
    except (OSError, EOFError, pa.ArrowException, tarfile.TarError, csv.Error) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read to its end ({what}); fetch or write it again") from error


def find_reader(path: Path) -> Callable[[Path], Iterator[Record]]:
    """Choose the reader of a file by the ending of its name, compression aside."""
    if path.is_dir():
        return read_folder
    if not path.exists():
        raise InputError(f"{path}: there is no such file; correct materials.path")
    name = path.name.lower().removesuffix(".zst").removesuffix(".gz")
    for ending, reader in READERS.items():
        if name.endswith(ending):
            return reader
    raise InputError(
        f"{path}: unknown kind of file; give one of {', '.join(READERS)} (also .gz, .zst) or a folder"
    )


def open_text(path: Path) -> io.TextIOWrapper:
    """Open text that may be compressed (.gz, .zst). A truncated file raises OSError."""
    return io.TextIOWrapper(pa.input_stream(str(path)), encoding="utf-8", errors="replace", newline="")


def read_json_lines(path: Path) -> Iterator[Record]:
    """Read one JSON object a line."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            name = f"{path.name}:{number}"
            if number == 1 and line.lstrip("\ufeff \t\r\n").startswith("["):
                raise InputError(f"{path}: is a JSON array; write one record a line (jq -c '.[]')")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield name, RecordError("unreadable record", f"not JSON: {error}")
                continue
            if isinstance(record, dict):
                yield name, record
            else:
                yield name, RecordError("unreadable record", "not a JSON object")


def read_csv(path: Path) -> Iterator[Record]:
    """Read a table with a header; every cell is text, and an empty one is a missing value."""
    csv.field_size_limit(1 << 30)  # a CIF in a cell outgrows the module's 128 kB
    with open_text(path) as lines:
        table = csv.DictReader(lines)
        for number, record in enumerate(table, 1):
            name = f"{path.name}:{number}"
            if None in record or None in record.values():
                yield (
                    name,
                    RecordError(
                        "unreadable record", f"not {len(table.fieldnames or ())} cells, as the header has"
                    ),
                )
            else:
                yield name, {key.lstrip("\ufeff"): cell or None for key, cell in record.items()}


def read_parquet(path: Path) -> Iterator[Record]:
    """Read a Parquet table."""
    number = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(BATCH):
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record


def read_folder(path: Path) -> Iterator[Record]:
    """Read the CIF files of a folder; a file's name is its id."""
    for file in list_cifs(path):
        yield from read_cif_file(file)


def list_cifs(folder: Path) -> list[Path]:
    """List the CIF files of a folder in the order of their names."""
    return sorted(file for file in folder.rglob("*.cif") if not file.name.startswith("."))


def read_cif_file(path: Path) -> Iterator[Record]:
    """Read one CIF file as a record without labels."""
    with open_text(path) as text:
        yield path.name, {"material_id": path.stem, "cif": text.read()}


def read_archive(path: Path) -> Iterator[Record]:
    """Read the CIF files of a tar archive in its order; nothing is unpacked to disk."""
    with pa.input_stream(str(path)) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file = Path(member.name)
            if not member.isfile() or file.suffix != ".cif" or file.name.startswith("."):
                continue
            handle = archive.extractfile(member)
            assert handle is not None
            yield file.name, {"material_id": file.stem, "cif": handle.read().decode("utf-8", "replace")}


READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tar": read_archive,
    ".tgz": read_archive,
    ".cif": read_cif_file,
}


def fingerprint(path: Path) -> dict[str, Any]:
    """Path, bytes and SHA-256 of what is read; of a folder, those of its CIF files together."""
    if not path.is_dir():
        return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    files = list_cifs(path)
    lines = "".join(f"{sha256_file(file)} {file.relative_to(path)}\n" for file in files)
    return {
        "path": str(path),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
