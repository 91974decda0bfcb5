"""Matbench v0.1 (Dunn et al., npj Comput. Mater. 6, 138, 2020): the published files of its structure tasks.

A file is a table in compressed JSON: {"index": [0, ...], "columns": ["structure", target], "data":
[[structure, value], ...]}, its columns in either order. matminer knows where it lies, and its SHA-256.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import requests

from castbench.errors import InputError
from castbench.labels import MATBENCH
from castbench.materials.readers import Record, Source, fingerprint
from castbench.provenance import atomic_path, sha256_file

log = logging.getLogger(__name__)
CITATION = "Matbench v0.1: A. Dunn et al., npj Comput. Mater. 6, 138 (2020), and the sources of its data sets"
AGAIN = "fetch it again"


@dataclass(frozen=True)
class Published:
    """What matminer says of a task's file."""

    url: str
    sha256: str
    n: int  # records
    column: str  # of the target


def published(task: str) -> Published:
    """Look up a task.

    Raises:
        InputError: it is no structure task of Matbench.
    """
    if task not in MATBENCH:
        raise InputError(
            f"{task}: is no Matbench task with structures; choose from {', '.join(MATBENCH)} "
            "(the others give compositions alone, and have no graph)"
        )
    from matminer.datasets.dataset_retrieval import get_dataset_attribute  # a second, and few verbs need it

    url, sha256, n, columns = (
        get_dataset_attribute(task, name) for name in ("url", "hash", "num_entries", "columns")
    )
    return Published(url, sha256, n, next(name for name in columns if name != "structure"))


def fetch_matbench(task: str, output: Path) -> None:
    """Download the published file of a task and verify its SHA-256.

    Raises:
        InputError: there is no such task, it cannot be fetched, or what came is not what was published.
    """
    known = published(task)
    with atomic_path(output) as partial:
        try:
            with requests.get(known.url, stream=True, timeout=60) as answer, partial.open("wb") as file:
                answer.raise_for_status()
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)
        except requests.RequestException as error:
            raise InputError(
                f"{task}: {known.url} cannot be fetched ({error}); start again, or put it into a folder "
                "and name that in materials.path"
            ) from error
        found = sha256_file(partial)
        if found != known.sha256:
            raise InputError(
                f"{task}: what {known.url} sent has SHA-256 {found[:16]}…, not the published "
                f"{known.sha256[:16]}…; start again"
            )
    log.info("%s: %.1f MB from %s", task, output.stat().st_size / 1e6, known.url)


def open_matbench(settings: Mapping[str, Any]) -> Source:
    """The tasks of `settings["files"]` ({task: file}), one after another; each has a column of labels.

    Raises:
        InputError: a file is missing or not of its task.
    """
    files = []
    for task, name in settings["files"].items():
        path, known = Path(name), published(task)
        n = read_header(path, known.column)
        files.append(fingerprint(path) | {"task": task, "n": n})
        files[-1]["published"] = files[-1]["sha256"] == known.sha256
        if not files[-1]["published"]:
            log.warning(
                "%s: is not the file that Matbench published; results are not comparable with others", path
            )
    return Source(
        origin="matbench",
        records=read_tasks(files),
        columns={},
        files=files,
        citation=CITATION,
        labels=list(settings["files"]),
    )


def read_tasks(files: list[dict[str, Any]]) -> Iterator[Record]:
    """Iterate over the records of files, entries of a manifest."""
    for file in files:
        path, task, ids = Path(file["path"]), file["task"], make_ids(file["task"], file["n"])
        for number, (structure, value) in enumerate(read_rows(path), 1):
            yield (
                f"{path.name}:{number}",
                {"material_id": next(ids), "structure": structure, task: read_value(value)},
            )


def make_ids(task: str, n: int) -> Iterator[str]:
    """Matbench's names of the n records of a task, in their order: mb-jdft2d-001."""
    prefix, width = task.replace("matbench", "mb").replace("_", "-"), len(str(n))
    return (f"{prefix}-{number:0{width}d}" for number in range(1, n + 1))


def read_value(value: Any) -> float | None:
    """A target value: a number, or a class as 0 or 1; None for anything else."""
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def open_json(path: Path) -> Iterator[Any]:
    """Open a task's file; what ends it early or is no JSON becomes one clear error.

    Raises:
        InputError: there is no such file, or it is truncated or damaged.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such file; correct materials.path, or make it null to download"
        )
    try:
        with gzip.open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, ijson.JSONError) as error:
        what = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be read to its end ({what}); {AGAIN}") from error


def read_header(path: Path, column: str) -> int:
    """Number of records of a task's file, by its index.

    Raises:
        InputError: the file is damaged, has no structures, or not the target `column`.
    """
    columns: list[str] = []
    n, wanted = 0, {"columns", "index"}
    with open_json(path) as file:
        for prefix, event, value in ijson.parse(file):
            if prefix == "columns.item":
                columns.append(value)
            elif prefix == "index.item":
                n += 1
            elif event == "end_array" and prefix in wanted:
                wanted.remove(prefix)
                if not wanted:  # the data follow, which take time
                    break
    if wanted:
        raise InputError(f"{path}: has no {sorted(wanted)[0]}; give the file that Matbench published")
    if sorted(columns) != sorted(["structure", column]):
        lack = "structures" if "structure" not in columns else f"target {column}"
        raise InputError(
            f"{path}: has no {lack} but {', '.join(columns)}; give the file that Matbench published"
        )
    return n


def read_rows(path: Path) -> Iterator[tuple[Any, Any]]:
    """Iterate over structures, as pymatgen's dictionaries, and values of a task's file."""
    with open_json(path) as file:
        for row in ijson.items(file, "data.item", use_float=True):
            if not isinstance(row, list) or len(row) != 2:
                raise InputError(f"{path}: a row is not a structure and a value; {AGAIN}")
            yield (row[0], row[1]) if isinstance(row[0], dict) else (row[1], row[0])


def read_values(path: Path) -> list[float]:
    """Values of all records of a task's file.

    Raises:
        InputError: the file is damaged, or a record has no value.
    """
    values = []
    for number, (_, value) in enumerate(read_rows(path), 1):
        found = read_value(value)
        if found is None:
            raise InputError(f"{path}:{number}: {value!r:.40} is no value of the target; {AGAIN}")
        values.append(found)
    return values
