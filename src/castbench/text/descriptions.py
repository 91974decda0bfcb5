"""Text descriptions of crystals, written by robocrystallographer or provided by the source."""

import heapq
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.materials.records import read_material
from castbench.materials.structures import pack_crystals
from castbench.provenance import atomic_path, write_json
from castbench.text import robocrystallographer
from castbench.text.normalise import plain

log = logging.getLogger(__name__)

SHARD_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of materials.parquet
        ("material_id", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),
        ("seconds", pa.float64()),
    ]
)
SCHEMA = SHARD_SCHEMA.remove(0)
ROW_GROUP = 1000
# source: the columns of materials.parquet that it reads
SOURCES = {
    "generate": ["structure"],
    "provided": ["text"],
    "provided_or_generated": ["structure", "text"],
}
TIME_LIMIT = 600  # seconds, for a crystal that belongs to no data set
STARTUP_LIMIT = 600  # seconds; imports from a cold network disk take minutes


def _serve(connection: Any, prepare: Callable[[], Any], function: Callable[[Any], str]) -> None:
    """Life of a worker process: answer every item with (result, "ok") or (None, "failed: reason")."""
    prepare()
    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str | None, str] = (function(item), "ok")
        except Exception as error:
            reason = " ".join([f"{type(error).__name__}:", *str(error).split()]).rstrip(":")
            answer = (None, f"failed: {reason[:200]}")
        connection.send(answer)


class Worker:
    """A process that calls `function` on one item at a time, killed and replaced when it hangs or dies.

    A process of its own, since a signal or a thread stops nothing that hangs in C code. It is spawned with a
    fixed hash seed, whatever this process has. Start-up does not count against the time limit.
    """

    def __init__(self, function: Callable[[Any], str], prepare: Callable[[], Any], time_limit: float):
        self.function, self.prepare, self.time_limit = function, prepare, time_limit
        self.process: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start a process, unless one runs, and wait until it is prepared."""
        if self.process is not None:
            return
        context = multiprocessing.get_context("spawn")
        before = dict(os.environ)
        os.environ.update(PYTHONHASHSEED="0", OMP_NUM_THREADS="1")
        try:
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(theirs, self.prepare, self.function), daemon=True
            )
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        try:
            ready = self.connection.poll(STARTUP_LIMIT) and self.connection.recv()
        except EOFError:
            ready = None
        if not ready:
            self.stop()
            raise RuntimeError("the description worker does not start; its own message is on standard error")

    def stop(self) -> None:
        """Kill the process, if one runs."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def __call__(self, item: Any) -> tuple[str | None, str]:
        """Result and status: "ok", "failed: reason" or "timeout"."""
        self.start()
        try:
            self.connection.send(item)
            if self.connection.poll(self.time_limit):
                return self.connection.recv()
            status = "timeout"
        except (EOFError, OSError):
            self.process.join()
            status = f"failed: worker died with exit code {self.process.exitcode}"
        self.stop()
        return None, status


def describe_crystal(crystal: Path, output: Path) -> None:
    """Describe the one crystal of a file: Parquet like descriptions.parquet, with one row.

    Args:
        crystal: a file of any kind that materials are read from, such as a CIF.
        output: material_id (the file's name without its ending, unless the record has one), text, ...

    Raises:
        InputError: the file holds no usable crystal, or robocrystallographer cannot describe it.
    """
    material = read_material(crystal)
    robocrystallographer.check_versions()
    with Worker(robocrystallographer.describe, robocrystallographer.prepare, TIME_LIMIT) as worker:
        worker.start()
        start = time.perf_counter()
        text, status = worker(pack_crystals([material.crystal])[0].as_py())
        seconds = time.perf_counter() - start
    if text is None:
        raise InputError(f"{crystal}: no description ({status}); give another crystal")
    row = {"material_id": material.material_id, "text": text, "status": status, "seconds": seconds}
    with atomic_path(output) as partial:
        pq.write_table(pa.Table.from_pylist([row], SCHEMA), partial)


def describe_shard(settings: dict[str, Any], materials: Path, shard: int, output: Path) -> None:
    """Describe rows shard, shard + shards, shard + 2 shards, ... of the materials, or take their own text.

    Provided text is brought to the form of generated text, whatever its signs for sub- and superscript.

    Args:
        settings: source ("generate", "provided", or "provided_or_generated": generate what is not provided),
            time_limit (seconds a crystal), shards.
        materials: materials.parquet.
        shard: 0, ..., shards - 1.
        output: Parquet with row, material_id, text (null when there is none), status, seconds.

    Raises:
        InputError: an unknown source, or a robocrystallographer whose texts were not compared with ours.
    """
    source, shards = settings["source"], settings["shards"]
    if source not in SOURCES:
        raise InputError(f"text.source {source}: unknown; use one of {', '.join(SOURCES)}")
    if source != "provided":
        robocrystallographer.check_versions()
    done: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    with (
        atomic_path(output) as partial,
        pq.ParquetWriter(partial, SHARD_SCHEMA) as writer,
        Worker(robocrystallographer.describe, robocrystallographer.prepare, settings["time_limit"]) as worker,
    ):
        for number, row in _rows(materials, SOURCES[source], shard, shards):
            seconds, provided = 0.0, row["text"] if source != "generate" else None
            if provided:
                text, status = plain(provided), "provided"
            elif source == "provided":
                text, status = None, "missing"
            else:
                worker.start()
                start = time.perf_counter()
                text, status = worker(row["structure"])
                seconds = time.perf_counter() - start
            if text is None:
                log.warning("%s: no description (%s); goes on with [CLS] alone", row["material_id"], status)
            done[_kind(status)] += 1
            rows.append(
                {
                    "row": number,
                    "material_id": row["material_id"],
                    "text": text,
                    "status": status,
                    "seconds": seconds,
                }
            )
            if len(rows) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA))
                rows.clear()
            if done.total() % 50 == 0:
                log.info("shard %d: %d crystals %s", shard, done.total(), dict(done))
        writer.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA))
    log.info("shard %d: done, %d crystals %s", shard, done.total(), dict(done))


def _rows(
    materials: Path, columns: list[str], shard: int, shards: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, material_id and `columns` of every `shards`-th row, streamed."""
    first = 0
    for batch in pq.ParquetFile(materials).iter_batches(ROW_GROUP, columns=["material_id", *columns]):
        chosen = range((shard - first) % shards, len(batch), shards)
        for i, row in zip(chosen, batch.take(pa.array(chosen, pa.int64())).to_pylist(), strict=True):
            yield first + i, row
        first += len(batch)


def _kind(status: str) -> str:
    """Status without its details: "failed: ValueError: ..." -> "failed: ValueError"."""
    return ":".join(status.split(":")[:2])


def gather_descriptions(shards: list[Path], output: Path, statistics: Path) -> None:
    """Merge the shards into the order of materials.parquet, and count them by status.

    Raises:
        InputError: rows are missing or doubled, so the shards are not of one run.
    """
    merged = heapq.merge(*map(_shard_rows, shards), key=lambda row: row["row"])
    by_status: Counter[str] = Counter()
    seconds: list[float] = []
    rows: list[dict[str, Any]] = []
    with atomic_path(output) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for expected, row in enumerate(merged):
            if row.pop("row") != expected:
                raise InputError(f"{output}: row {expected} is missing or doubled; make all shards again")
            by_status[_kind(row["status"])] += 1
            seconds.append(row["seconds"])
            rows.append(row)
            if len(rows) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    n = by_status.total()
    quantiles = {name: q for name, q in (("median", 0.5), ("p95", 0.95), ("max", 1.0))}
    write_json(
        statistics,
        {
            "n": n,
            "success_rate": (by_status["ok"] + by_status["provided"]) / n if n else 0.0,
            "by_status": dict(by_status),
            "seconds": {
                "total": sum(seconds),
                **{name: float(np.quantile(seconds, q)) if n else 0.0 for name, q in quantiles.items()},
            },
        },
    )


def _shard_rows(shard: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(shard).iter_batches(ROW_GROUP):
        yield from batch.to_pylist()
