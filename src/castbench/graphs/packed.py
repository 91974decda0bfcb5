"""Graphs of many crystals in a few memory-mapped arrays, end to end, with offsets."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.provenance import sha256_file, write_json

FORMAT = 2  # raise it whenever the files or the graphs in them change
NODE_ARRAYS = {"atomic_numbers": np.uint8, "multiplicities": np.float32}
EDGE_ARRAYS = {
    "edge_source": np.int32,
    "edge_target": np.int32,
    "distances": np.float32,
    "edge_multiplicities": np.float32,
}
OFFSETS = {"node_offsets": np.int64, "edge_offsets": np.int64}
ARRAYS = OFFSETS | NODE_ARRAYS | EDGE_ARRAYS
EXTRA_ARRAYS = {"vectors": np.float32, "edge_reverse": np.int32, "ridge_areas": np.float32}  # of some kinds
COLUMNS = {"vectors": (3,)}
INDEX = pa.schema(
    [
        ("material_id", pa.string()),
        ("status", pa.string()),
        ("n_nodes", pa.int32()),
        ("n_edges", pa.int32()),
        ("spacegroup", pa.int16()),
    ]
)
LENGTHS = (
    dict.fromkeys(OFFSETS, "n_graphs")
    | dict.fromkeys(NODE_ARRAYS, "n_nodes")
    | dict.fromkeys(EDGE_ARRAYS | EXTRA_ARRAYS, "n_edges")
)
Result = CrystalGraph | str  # a graph, or why there is none


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a finished graph cache; InputError where there is none of this format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no manifest.json, so no finished graphs; build them again") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); build the graphs again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not of graph format {FORMAT}; build the graphs again")
    return manifest


class GrowingArray:
    """A .npy file of numbers, or of rows of `columns` numbers, that is written piece by piece."""

    def __init__(self, path: Path, dtype: type, columns: tuple[int, ...] = ()):
        self.dtype, self.columns, self.length = np.dtype(dtype), columns, 0
        path.unlink(missing_ok=True)  # who has mapped the old file keeps it whole
        self.handle: BinaryIO = path.open("xb")
        self._header()

    def _header(self) -> None:
        # numpy pads the header so that a longer shape fits in its place.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length, *self.columns)}
        np.lib.format.write_array_header_1_0(self.handle, header)

    def append(self, pieces: Sequence[np.ndarray]) -> None:
        """Add the pieces at the end."""
        for piece in pieces:
            self.handle.write(np.ascontiguousarray(piece, dtype=self.dtype).data)
            self.length += len(piece)

    def close(self) -> None:
        """Write the final length, to the disk."""
        self.handle.seek(0)
        self._header()
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()


class PackedWriter:
    """Writes the folder that `PackedGraphs` reads; memory does not grow with the number of crystals.

    The manifest goes first and comes back last, so that what a killed run leaves is never taken for a cache.
    `extras` are the names of `EXTRA_ARRAYS` that the graphs have.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], source: str, extras: Sequence[str] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        self.folder = folder
        self.made_from = {"settings": settings, "source": source}
        dtypes = ARRAYS | {name: EXTRA_ARRAYS[name] for name in extras}
        self.arrays = {
            name: GrowingArray(folder / f"{name}.npy", dtype, COLUMNS.get(name, ()))
            for name, dtype in dtypes.items()
        }
        for name in EXTRA_ARRAYS.keys() - dtypes.keys():
            (folder / f"{name}.npy").unlink(missing_ok=True)  # of graphs of another kind
        self.index = pq.ParquetWriter(folder / "index.parquet", INDEX)
        self.n_nodes = self.n_edges = self.n_edges_expanded = self.n_failed = 0
        self.nodes_squared = 0
        for name in OFFSETS:
            self.arrays[name].append([np.zeros(1, np.int64)])

    def append(self, material_ids: Sequence[str], results: Sequence[Result]) -> None:
        """Add crystals in order. One without a graph has no nodes, and its reason stands in the index."""
        graphs = [result for result in results if isinstance(result, CrystalGraph)]
        for name in self.arrays.keys() - OFFSETS.keys():
            self.arrays[name].append([getattr(graph, name) for graph in graphs])
        is_graph = [isinstance(result, CrystalGraph) for result in results]
        nodes, edges = np.zeros(len(results), np.int64), np.zeros(len(results), np.int64)
        spacegroups: list[int | None] = [None] * len(results)
        for row, graph in zip(np.flatnonzero(is_graph), graphs, strict=True):
            nodes[row], edges[row] = len(graph.atomic_numbers), len(graph.distances)
            spacegroups[row] = graph.spacegroup
        self.arrays["node_offsets"].append([self.n_nodes + np.cumsum(nodes)])
        self.arrays["edge_offsets"].append([self.n_edges + np.cumsum(edges)])
        status = ["ok" if isinstance(result, CrystalGraph) else f"failed: {result}" for result in results]
        self.index.write_table(pa.table([material_ids, status, nodes, edges, spacegroups], schema=INDEX))
        self.n_nodes += int(nodes.sum())
        self.n_edges += int(edges.sum())
        self.n_edges_expanded += int(sum(graph.edge_multiplicities.sum() for graph in graphs))
        self.n_failed += len(results) - len(graphs)
        self.nodes_squared += int((nodes**2).sum())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.index.close()
        for array in self.arrays.values():
            array.close()
        if error is None:
            self._write_manifest()

    def _write_manifest(self) -> None:
        n_graphs = self.arrays["node_offsets"].length - 1
        n_ok = max(n_graphs - self.n_failed, 1)
        mean = self.n_nodes / n_ok  # over the crystals that have a graph
        files = [*(f"{name}.npy" for name in self.arrays), "index.parquet"]
        manifest = self.made_from | {
            "format": FORMAT,
            "n_graphs": n_graphs,
            "n_failed": self.n_failed,
            "n_nodes": self.n_nodes,
            "n_edges": self.n_edges,
            "n_edges_expanded": self.n_edges_expanded,  # with parallel edges, as in the reference
            "nodes_mean": mean,
            "nodes_std": max(self.nodes_squared / n_ok - mean**2, 0.0) ** 0.5,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in (self.folder / name for name in files)
            },
        }
        write_json(self.folder / "manifest.json", manifest)


@dataclass(frozen=True)
class PackedGraphs:
    """Graphs of G crystals with N nodes and E edges in all; the arrays are memory-mapped and read-only.

    Attributes:
        node_offsets, edge_offsets: (G + 1,) int64; crystal g has nodes node_offsets[g]:node_offsets[g + 1].
        atomic_numbers, multiplicities: (N,), see `CrystalGraph`.
        edge_source, edge_target: (E,), nodes counted within the crystal.
        distances, edge_multiplicities: (E,), distances in angstrom.
        vectors, edge_reverse, ridge_areas: (E, 3), (E,) and (E,), edges counted within the crystal; None in
            graphs of an encoder that does not read them.
        manifest: what made the cache, counts, and the hash of each file.
    """

    folder: Path
    manifest: dict[str, Any]
    node_offsets: np.ndarray
    edge_offsets: np.ndarray
    atomic_numbers: np.ndarray
    multiplicities: np.ndarray
    edge_source: np.ndarray
    edge_target: np.ndarray
    distances: np.ndarray
    edge_multiplicities: np.ndarray
    vectors: np.ndarray | None = None
    edge_reverse: np.ndarray | None = None
    ridge_areas: np.ndarray | None = None

    @classmethod
    def open(cls, folder: Path, source: str | None = None, verify: bool = False) -> Self:
        """Map a graph cache.

        Args:
            folder: written by `build_graphs`.
            source: SHA-256 of the materials.parquet that it must be of; None takes any.
            verify: also read every file and check its hash.

        Raises:
            InputError: the cache is missing, unfinished, damaged, or of other materials.
        """
        manifest = read_manifest(folder)
        if source is not None and manifest["source"] != source:
            raise InputError(f"{folder}: graphs of other materials; build them again")
        for name, recorded in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                raise InputError(f"{path}: missing or of another size than recorded; build the graphs again")
            if verify and sha256_file(path) != recorded["sha256"]:
                raise InputError(f"{path}: does not match its hash; build the graphs again")
        arrays = {}
        present = {name: dtype for name, dtype in EXTRA_ARRAYS.items() if f"{name}.npy" in manifest["files"]}
        for name, dtype in (ARRAYS | present).items():
            try:
                arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError) as error:
                raise InputError(f"{folder / name}.npy: {error}; build the graphs again") from error
            length = manifest[LENGTHS[name]] + (name in OFFSETS)
            if arrays[name].shape != (length, *COLUMNS.get(name, ())) or arrays[name].dtype != dtype:
                wanted = f"{length} values of {dtype.__name__}"
                raise InputError(f"{folder / name}.npy: not {wanted}; build the graphs again")
        return cls(folder, manifest, **arrays)

    @property
    def edge_arrays(self) -> dict[str, np.ndarray]:
        """The arrays over edges that these graphs have, by name."""
        found = {name: getattr(self, name) for name in EDGE_ARRAYS | EXTRA_ARRAYS}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def n_graphs(self) -> int:
        """Crystals, with those that have no graph."""
        return len(self.node_offsets) - 1

    def index(self) -> pa.Table:
        """One row a crystal: material_id, status ("ok" or "failed: why"), n_nodes, n_edges, spacegroup."""
        return pq.read_table(self.folder / "index.parquet")

    def __len__(self) -> int:
        return self.n_graphs

    def __getitem__(self, crystal: int) -> CrystalGraph:
        nodes = slice(*self.node_offsets[crystal : crystal + 2])
        edges = slice(*self.edge_offsets[crystal : crystal + 2])
        parts: dict[str, Any] = {name: getattr(self, name)[nodes] for name in NODE_ARRAYS}
        parts |= {name: array[edges] for name, array in self.edge_arrays.items()}
        return CrystalGraph(**parts)
