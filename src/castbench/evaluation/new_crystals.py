"""Crystals that no data set holds: read from files, and given graphs and texts like those of a data set."""

import fnmatch
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pymatgen.core import Structure

from castbench.errors import InputError
from castbench.graphs.build import build_graphs
from castbench.materials.readers import READERS, Record, read_records, uncompressed
from castbench.materials.records import SCHEMA, Columns, Material, to_table
from castbench.materials.structures import RecordError
from castbench.packed import read_manifest, write_manifest
from castbench.text import find_encoder
from castbench.text.descriptions import TIME_LIMIT, describe_shard, gather_descriptions
from castbench.text.states import PackedStates, embed_text
from castbench.text.tokens import PackedTokens, tokenize_text

log = logging.getLogger(__name__)

# Files of a folder that are looked at, compressed or not; one that is named itself may be called anything.
IN_FOLDERS = (
    "*.cif",
    "*.mcif",
    "*poscar*",
    "*contcar*",
    "*.vasp",
    "*.xsf",
    "*.res",
    "vasprun*.xml",
    "*.json",
)
SHOWN = 5  # names of files that were passed over
CHUNK = 1000  # crystals held at once


def read_files(paths: Iterable[Path]) -> Iterator[Record]:
    """Records of files and folders, by name (file, or file:row); a RecordError stands for what is unreadable.

    A file is of any kind that materials are read from (JSON lines, CSV, Parquet in our columns, CIF, tar of
    CIFs), or that pymatgen reads.
    """
    for path in paths:
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith(".")]
            crystals = [file for file in files if is_crystal(file)]
            if others := [file.name for file in files if not is_crystal(file)]:
                names = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
                log.warning(
                    "%s: %d files passed over, no crystals by their names: %s", path, len(others), names
                )
            yield from read_files(crystals)
            continue
        yield from named(path, read_file(path))


def is_crystal(file: Path) -> bool:
    """Whether a file in a folder is looked at."""
    return any(fnmatch.fnmatchcase(uncompressed(file).lower(), kind) for kind in IN_FOLDERS)


def named(path: Path, records: Iterable[Record]) -> Iterator[Record]:
    """The records of a file, by its path; a RecordError stands for what is unreadable."""
    try:
        for name, record in records:
            yield str(path.parent / name), record
    except InputError as error:
        yield str(path), RecordError("unreadable file", str(error).removeprefix(f"{path}: "))


def read_file(path: Path) -> Iterator[Record]:
    """Records of one file, see `read_files`."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    own = uncompressed(path).lower().endswith(tuple(READERS))
    if own and path.suffix != ".json":
        yield from read_records(path)
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            structure = Structure.from_file(path)
    except Exception as error:  # pymatgen raises what it likes
        if own:  # JSON lines, or a record of ours
            yield from read_records(path)
        else:
            yield path.name, RecordError("unreadable file", f"pymatgen: {error or type(error).__name__}")
        return
    name = path.stem if path.suffix else path.name
    yield path.name, {"material_id": name, "structure": structure.as_dict()}


def read_columns(manifest: Path) -> Columns:
    """The column mapping of a data set by its manifest, and default names for what has others."""
    mapping = json.loads(manifest.read_text(encoding="utf-8"))["columns"] if manifest.exists() else {}
    return Columns(mapping, fallback=True)


def write_materials(paths: Iterable[Path], columns: Columns, output: Path) -> tuple[list[str], int]:
    """Write the usable crystals of files as materials.parquet; each of the others costs a line in the log.

    Returns:
        Where each row came from (file, or file:row), and the number of the others.
    """
    sources: list[str] = []
    kept: list[Material] = []
    failures = 0
    with pq.ParquetWriter(output, SCHEMA) as writer:
        for name, record in read_files(paths):
            try:
                if isinstance(record, RecordError):
                    raise record
                kept.append(columns.read(record, Path(name).name, "file"))
                sources.append(name)
            except RecordError as error:
                log.error("%s: %s; no prediction", name, error)
                failures += 1
            if len(kept) == CHUNK:
                writer.write_table(to_table(kept))
                kept.clear()
        if kept:
            writer.write_table(to_table(kept))
    return sources, failures


def read_formulas(given: Iterable[Path], columns: Columns) -> Iterator[tuple[str, Any]]:
    """Formulas as they are given, or in the column `formula` of tables; a RecordError for what has none."""
    for word in given:
        if not word.exists():
            yield str(word), str(word)
            continue
        for name, record in named(word, read_records(word)):
            yield name, record if isinstance(record, RecordError) else columns.get(record, "formula")


def run_encoder(record: dict[str, Any], results: Path) -> Path | None:
    """The text encoder of a run of the data set `results`; None for a model that reads no text.

    Raises:
        InputError: it is not there.
    """
    if record["text"] == "none":
        return None
    return find_encoder(
        results.parent / "encoders", read_manifest(results / "tokens", "tokenize_text")["encoder"]["checksum"]
    )


def make_caches(materials: Path, folder: Path, results: Path, encoder: Path | None, threads: int = 1) -> None:
    """Graphs and, with an encoder, descriptions and tokens, by the settings of the data set `results`.

    Where texts of that data set came from its source, so may these; else all are generated.

    Args:
        materials: materials.parquet of the new crystals.
        folder: gets graphs/, descriptions.parquet and tokens/.
        results: results/{dataset}.
        encoder: of the texts.
        threads: that build graphs.
    """
    settings = json.loads((results / "graphs" / "manifest.json").read_text(encoding="utf-8"))["settings"]
    build_graphs(settings, materials, folder / "graphs", threads)
    if encoder is None:
        return
    shard, statistics = folder / "shard.parquet", results / "descriptions.json"
    counts = json.loads(statistics.read_text(encoding="utf-8"))["by_status"] if statistics.exists() else {}
    source = "provided_or_generated" if "provided" in counts else "generate"
    describe_shard({"source": source, "time_limit": TIME_LIMIT, "shards": 1}, materials, 0, shard)
    gather_descriptions([shard], folder / "descriptions.parquet", folder / "descriptions.json")
    max_tokens = read_manifest(results / "tokens", "tokenize_text")["max_tokens"]
    tokenize_text({"max_tokens": max_tokens}, folder / "descriptions.parquet", encoder, folder / "tokens")


def make_states(folder: Path, results: Path, encoder: Path, remaining: int, device: str) -> Path:
    """States of the tokens that `make_caches` left in `folder`; see `embed_text`.

    The last bits of a text's states depend on the texts that it was run with. So those of a text that the
    data set has are taken from there, and a crystal of it is predicted as it was in training.
    """
    states = folder / "text_states"
    embed_text(folder / "tokens", encoder, remaining, states, device)
    known = results / "text_states" / str(remaining)
    if not (known / "manifest.json").exists():
        log.warning(
            "%s: is not there; states of texts that the run knows may differ in their last bits", known
        )
        return states
    there, ours = PackedStates.open(known, results / "tokens"), PackedTokens.open(folder / "tokens")
    wanted: dict[bytes, list[int]] = {}
    for text in range(len(ours)):
        wanted.setdefault(ours[text].tobytes(), []).append(text)
    theirs = PackedTokens.open(results / "tokens")
    array = np.load(states / "states.npy", mmap_mode="r+", allow_pickle=False)
    for number in range(len(theirs)):
        for text in wanted.pop(theirs[number].tobytes(), ()):
            first, end = theirs.token_offsets[number : number + 2]
            array[slice(*ours.token_offsets[text : text + 2])] = there.states[first:end]
    array.flush()
    content = read_manifest(states, "embed_text")
    write_manifest(states, "embed_text", content, ["states.npy"])
    return states
