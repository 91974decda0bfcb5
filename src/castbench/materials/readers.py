"""Records from files, one at a time: JSON lines, CSV, Parquet, CIF files, a folder or an archive of these."""

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
from castbench.materials.structures import RecordError, cif_blocks
from castbench.provenance import sha256_file

Record = tuple[str, dict[str, Any] | RecordError]  # its name in messages, and what it says
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BATCH = 1_000
LABELS_FILE = "labels.csv"  # of CIF files in one folder or archive; its first column has their names


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
    for ending, reader in READERS.items():
        if uncompressed(path).lower().endswith(ending):
            return reader
    raise InputError(
        f"{path}: unknown kind of file; give one of {', '.join(READERS)} (also .gz, .zst) or a folder"
    )


def uncompressed(path: Path) -> str:
    """A file's name without an ending that says how it is compressed."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def open_text(path: Path) -> io.TextIOWrapper:
    """Open text that may be compressed (.gz, .zst). A truncated file raises OSError."""
    return decoded(pa.input_stream(str(path)))


def decoded(stream: pa.NativeFile) -> io.TextIOWrapper:
    """The text of a stream, without the mark that some programs begin it with."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def read_json_lines(path: Path) -> Iterator[Record]:
    """Read one JSON object a line."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            name = f"{path.name}:{number}"
            if number == 1 and line.lstrip().startswith("["):
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
    with open_text(path) as lines:
        yield from parse_csv(path.name, lines)


def parse_csv(file: str, lines: Iterable[str]) -> Iterator[Record]:
    """Records of the lines of a CSV file, see `read_csv`."""
    csv.field_size_limit(1 << 30)  # a CIF in a cell outgrows the module's 128 kB
    table = csv.DictReader(lines)
    for number, record in enumerate(table, 1):
        name = f"{file}:{number}"
        if None in record or None in record.values():
            cells = len(table.fieldnames or ())
            yield name, RecordError("unreadable record", f"not {cells} cells, as the header has")
        else:
            yield name, {key: cell or None for key, cell in record.items()}


def read_parquet(path: Path) -> Iterator[Record]:
    """Read a Parquet table."""
    number = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(BATCH):
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record


def read_folder(path: Path) -> Iterator[Record]:
    """Read the CIF files of a folder, with what labels.csv says of each; a file's name is its id."""
    table = path / LABELS_FILE
    labels = list(read_csv(table)) if table.exists() else []
    yield from labelled(labels, (record for file in list_cifs(path) for record in read_cif_file(file)))


def list_cifs(folder: Path) -> list[Path]:
    """List the CIF files of a folder in the order of their names."""
    return sorted(file for file in folder.rglob("*") if is_cif(file))


def is_cif(path: Path) -> bool:
    """Whether a file is a CIF by its name."""
    return not path.name.startswith(".") and uncompressed(path).lower().endswith(".cif")


def read_cif_file(path: Path) -> Iterator[Record]:
    """Read the crystals of a CIF file, see `parse_cif`."""
    with open_text(path) as text:
        yield from parse_cif(path, text.read())


def parse_cif(path: Path, text: str) -> Iterator[Record]:
    """Records of the crystals of a CIF, without labels: called as the file, numbered if they are several."""
    identifier, blocks = Path(uncompressed(path)).stem, cif_blocks(text)
    if len(blocks) < 2:
        yield path.name, {"material_id": identifier, "cif": text}
        return
    for number, block in enumerate(blocks, 1):
        yield f"{path.name}:{number}", {"material_id": f"{identifier}-{number}", "cif": block}


def labelled(labels: Iterable[Record], crystals: Iterable[Record]) -> Iterator[Record]:
    """Crystals of CIF files with the row of labels that has their id in its first column.

    A row that no crystal has, or a second one of a crystal, is a RecordError.
    """
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, row in labels:
        if isinstance(row, RecordError):
            yield name, row
            continue
        identifier = uncompressed(Path(str(next(iter(row.values()), "")).strip()))
        if identifier.lower().endswith(".cif"):
            identifier = identifier[: -len(".cif")]
        if identifier in rows:
            yield name, RecordError("duplicate id", f"{rows[identifier][0]} has labels of {identifier} too")
            continue
        rows[identifier] = name, row
    for name, record in crystals:
        if not isinstance(record, RecordError):
            _, row = rows.pop(record["material_id"], ("", {}))
            record = row | record
        yield name, record
    for identifier, (name, _) in rows.items():
        yield name, RecordError("missing structure", f"there is no CIF of {identifier}")


def read_archive(path: Path) -> Iterator[Record]:
    """Read the CIF files of a tar archive as those of a folder; nothing is unpacked to disk."""
    tables = archived(path, lambda file: file.name == LABELS_FILE)
    labels = [record for file, text in tables for record in parse_csv(file.name, io.StringIO(text))]
    cifs = archived(path, is_cif)
    yield from labelled(labels, (record for file, text in cifs for record in parse_cif(file, text)))


def archived(path: Path, wanted: Callable[[Path], bool]) -> Iterator[tuple[Path, str]]:
    """Iterate over the files of an archive, in its order, whose names are wanted."""
    with pa.input_stream(str(path)) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isfile() and wanted(Path(member.name)):
                handle = archive.extractfile(member)
                assert handle is not None
                compression = COMPRESSIONS.get(Path(member.name).suffix.lower())
                content = pa.input_stream(pa.BufferReader(handle.read()), compression=compression)
                yield Path(member.name), decoded(content).read()


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
    """Path, bytes and SHA-256 of what is read; of a folder, those of its files together."""
    if not path.is_dir():
        return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    files = [*list_cifs(path), *path.glob(LABELS_FILE)]
    lines = "".join(f"{sha256_file(file)} {file.relative_to(path)}\n" for file in files)
    return {
        "path": str(path),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
