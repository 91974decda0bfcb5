"""Graphs of many crystals in a few memory-mapped arrays, end to end, with offsets."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from castbench.errors import InputError
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.packed import growing_array, read_manifest, write_manifest

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
        for name in EXTRA_ARRAYS.keys() - dtypes.keys():
            (folder / f"{name}.npy").unlink(missing_ok=True)  # of graphs of another kind
        self.open = ExitStack()
        self.arrays = {
            name: self.open.enter_context(growing_array(folder / f"{name}.npy", dtype, COLUMNS.get(name, ())))
            for name, dtype in dtypes.items()
        }
        self.index = self.open.enter_context(pq.ParquetWriter(folder / "index.parquet", INDEX))
        self.n_graphs = self.n_failed = self.n_nodes = self.n_edges = self.n_edges_expanded = 0
        self.nodes_squared = 0
        for name in OFFSETS:
            self.arrays[name](np.zeros(1, np.int64))

    def append(self, material_ids: Sequence[str], results: Sequence[Result]) -> None:
        """Add crystals in order. One without a graph has no nodes, and its reason stands in the index."""
        graphs = [result for result in results if isinstance(result, CrystalGraph)]
        for name in self.arrays.keys() - OFFSETS.keys():
            for graph in graphs:
                self.arrays[name](getattr(graph, name))
        is_graph = [isinstance(result, CrystalGraph) for result in results]
        nodes, edges = np.zeros(len(results), np.int64), np.zeros(len(results), np.int64)
        spacegroups: list[int | None] = [None] * len(results)
        for row, graph in zip(np.flatnonzero(is_graph), graphs, strict=True):
            nodes[row], edges[row] = len(graph.atomic_numbers), len(graph.distances)
            spacegroups[row] = graph.spacegroup
        self.arrays["node_offsets"](self.n_nodes + np.cumsum(nodes))
        self.arrays["edge_offsets"](self.n_edges + np.cumsum(edges))
        status = ["ok" if isinstance(result, CrystalGraph) else f"failed: {result}" for result in results]
        self.index.write_table(pa.table([material_ids, status, nodes, edges, spacegroups], schema=INDEX))
        self.n_graphs += len(results)
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
        self.open.__exit__(kind, error, trace)
        if error is None:
            self._write_manifest()

    def _write_manifest(self) -> None:
        n_ok = max(self.n_graphs - self.n_failed, 1)
        mean = self.n_nodes / n_ok  # over the crystals that have a graph
        content = self.made_from | {
            "n_graphs": self.n_graphs,
            "n_failed": self.n_failed,
            "n_nodes": self.n_nodes,
            "n_edges": self.n_edges,
            "n_edges_expanded": self.n_edges_expanded,  # with parallel edges, as in the reference
            "nodes_mean": mean,
            "nodes_std": max(self.nodes_squared / n_ok - mean**2, 0.0) ** 0.5,
        }
        files = [*(f"{name}.npy" for name in self.arrays), "index.parquet"]
        write_manifest(self.folder, "build_graphs", content, files)


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
        manifest = read_manifest(folder, "build_graphs", verify)
        if source is not None and manifest["source"] != source:
            raise InputError(f"{folder}: graphs of other materials; run build_graphs again")
        arrays = {}
        present = {name: dtype for name, dtype in EXTRA_ARRAYS.items() if f"{name}.npy" in manifest["files"]}
        for name, dtype in (ARRAYS | present).items():
            try:
                arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError) as error:
                raise InputError(f"{folder / name}.npy: {error}; run build_graphs again") from error
            length = manifest[LENGTHS[name]] + (name in OFFSETS)
            if arrays[name].shape != (length, *COLUMNS.get(name, ())) or arrays[name].dtype != dtype:
                wanted = f"{length} values of {dtype.__name__}"
                raise InputError(f"{folder / name}.npy: not {wanted}; run build_graphs again")
        return cls(folder, manifest, **arrays)

    @property
    def edge_arrays(self) -> dict[str, np.ndarray]:
        """The arrays over edges that these graphs have, by name."""
        found = {name: getattr(self, name) for name in EDGE_ARRAYS | EXTRA_ARRAYS}
        return {name: array for name, array in found.items() if array is not None}

    def index(self) -> pa.Table:
        """One row a crystal: material_id, status ("ok" or "failed: why"), n_nodes, n_edges, spacegroup."""
        return pq.read_table(self.folder / "index.parquet")

    def __len__(self) -> int:
        return len(self.node_offsets) - 1

    def __getitem__(self, crystal: int) -> CrystalGraph:
        nodes = slice(*self.node_offsets[crystal : crystal + 2])
        edges = slice(*self.edge_offsets[crystal : crystal + 2])
        parts: dict[str, Any] = {name: getattr(self, name)[nodes] for name in NODE_ARRAYS}
        parts |= {name: array[edges] for name, array in self.edge_arrays.items()}
        return CrystalGraph(**parts)
