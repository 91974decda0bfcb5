"""A snapshot: downloaded documents in one file that says what it holds, and whether it is whole.

zstd-compressed JSON lines: a header (what was asked of which database, and when), one document a line, and a
footer with the number of documents and the SHA-256 of all lines before it. The same header and documents give
the same bytes.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from castbench.errors import InputError
from castbench.provenance import atomic_path

FORMAT = "castbench snapshot 1"
AGAIN = "fetch or download it again"


def write_snapshot(path: Path, header: dict[str, Any], documents: Iterable[dict[str, Any]]) -> None:
    """Write a snapshot, atomically and one document at a time.

    Raises:
        InputError: the disk is full.
    """
    digest, count = hashlib.sha256(), 0
    compressor = zstandard.ZstdCompressor(level=6, write_checksum=True)
    with atomic_path(path) as partial, partial.open("wb") as file, compressor.stream_writer(file) as writer:

        def write(content: dict[str, Any]) -> None:
            line = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"
            digest.update(line.encode())
            writer.write(line.encode())

        write(header | {"format": FORMAT})
        for count, document in enumerate(documents, 1):  # noqa: B007
            write(document)
        write({"footer": {"documents": count, "sha256": digest.hexdigest()}})


def read_header(path: Path) -> dict[str, Any]:
    """Read what a snapshot says about itself, once all of it was found whole.

    Raises:
        InputError: there is no such file, or it is no snapshot, truncated or damaged.
    """
    lines = read_lines(path)
    header = next(lines)
    for _ in lines:
        pass
    return json.loads(header)


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the documents of a snapshot whose header was read."""
    lines = read_lines(path)
    next(lines)
    for line in lines:
        yield json.loads(line)


def read_lines(path: Path) -> Iterator[bytes]:
    """Iterate over header and documents as they stand in the file, and check them against the footer."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such snapshot; correct materials.snapshot")
    digest, count, line = hashlib.sha256(), -1, b""
    try:
        # A truncated file ends early, and silently: the footer is what tells.
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            for line in io.BufferedReader(reader):  # type: ignore[arg-type]
                if line.startswith(b'{"footer":') or (count < 0 and not is_header(line)):
                    break
                digest.update(line)
                count += 1
                yield line
    except zstandard.ZstdError as error:
        what = "is damaged" if count >= 0 else "is no snapshot"
        raise InputError(f"{path}: {what} ({error}); {AGAIN}") from None
    if count < 0:
        raise InputError(f"{path}: is no snapshot of this version of castbench; {AGAIN}")
    expected = {"documents": count, "sha256": digest.hexdigest()}
    if not line.startswith(b'{"footer":') or not line.endswith(b"\n"):
        raise InputError(f"{path}: is truncated after {count} documents; {AGAIN}")
    if json.loads(line)["footer"] != expected:
        raise InputError(f"{path}: is damaged (its documents are not those that its footer counts); {AGAIN}")


def is_header(line: bytes) -> bool:
    """Whether a line is the header of a snapshot."""
    try:
        header = json.loads(line)
    except ValueError:
        return False
    return isinstance(header, dict) and header.get("format") == FORMAT
