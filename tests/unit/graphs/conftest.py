"""Crystals for the graph tests, and what to compare of their graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Structure

import crystals
from castbench.graphs.crystal_graph import CrystalGraph


@pytest.fixture(scope="session")
def prototypes() -> dict[str, Structure]:
    """Textbook crystals whose neighbour shells are known."""
    return crystals.prototypes()


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., CrystalGraph]:
    """The graph of a pymatgen structure."""

    def graph(structure: Structure, **settings: Any) -> CrystalGraph:
        numbers = np.array(structure.atomic_numbers)
        return crystals.cogn_graph(structure.lattice.matrix, structure.frac_coords, numbers, **settings)

    return graph


@pytest.fixture(scope="session")
def edges_of() -> Callable[[CrystalGraph], np.ndarray]:
    """Edges as sorted rows: elements of source and target, their shares of the cell, distance.

    Parallel edges are expanded, as the reference has them.
    """

    def edges(graph: CrystalGraph) -> np.ndarray:
        share = graph.multiplicities / graph.multiplicities.sum()
        ends = [
            values[nodes]
            for values in (graph.atomic_numbers, share.round(5))
            for nodes in (graph.edge_source, graph.edge_target)
        ]
        rows = np.column_stack([*ends, graph.distances]).repeat(graph.edge_multiplicities.astype(int), axis=0)
        return rows[np.lexsort((rows[:, 4], *rows[:, :4].T))]

    return edges


@pytest.fixture(scope="session")
def random_crystal() -> Callable[[int, int], Structure]:
    """Make a crystal of a space group from a seed: two or three elements, random or special positions."""
    return crystals.crystal_of_spacegroup


@pytest.fixture
def write_materials(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (id, lattice, species, fractional coordinates) as the columns that graphs read."""

    def write(rows: Sequence[tuple[str, Any, list[str], Any]], name: str = "materials.parquet") -> Path:
        structures = [
            {
                "lattice": np.ravel(cell).tolist(),
                "species": species,
                "frac_coords": np.ravel(positions).tolist(),
            }
            for _, cell, species, positions in rows
        ]
        number = pa.list_(pa.float64())
        structure = pa.struct({"lattice": number, "species": pa.list_(pa.string()), "frac_coords": number})
        columns = {
            "material_id": pa.array([row[0] for row in rows], pa.string()),
            "structure": pa.array(structures, structure),
        }
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    return write
