"""Crystals for the graph tests, and what to compare of their graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume
from pymatgen.core import Lattice, Structure

from castbench.graphs.neighbours import CrystalGraph, crystal_graph


@pytest.fixture(scope="session")
def prototypes() -> dict[str, Structure]:
    """Textbook crystals whose neighbour shells are known."""

    def cubic(spacegroup: int, a: float, sites: dict[str, list[float]]) -> Structure:
        return Structure.from_spacegroup(spacegroup, Lattice.cubic(a), list(sites), list(sites.values()))

    return {
        "rocksalt": cubic(225, 5.64, {"Na": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}),
        "fcc": cubic(225, 3.61, {"Cu": [0, 0, 0]}),
        "caesium chloride": cubic(221, 4.12, {"Cs": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}),
        "diamond": cubic(227, 3.57, {"C": [0, 0, 0]}),
        "perovskite": cubic(221, 3.9, {"Sr": [0, 0, 0], "Ti": [0.5, 0.5, 0.5], "O": [0.5, 0.5, 0]}),
        "wurtzite": Structure.from_spacegroup(
            186, Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
        ),
        "quartz": Structure.from_spacegroup(
            154, Lattice.hexagonal(4.916, 5.405), ["Si", "O"], [[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.7858]]
        ),
    }


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., CrystalGraph]:
    """The graph of a pymatgen structure."""

    def graph(structure: Structure, **settings: Any) -> CrystalGraph:
        numbers = np.array(structure.atomic_numbers)
        return crystal_graph(structure.lattice.matrix, structure.frac_coords, numbers, **settings)

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
    return crystal_of_spacegroup


def crystal_of_spacegroup(spacegroup: int, seed: int) -> Structure:
    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(4, 9, 3)
    if spacegroup >= 195:
        lattice = Lattice.cubic(a)
    elif spacegroup >= 143:
        lattice = Lattice.hexagonal(a, c)
    elif spacegroup >= 75:
        lattice = Lattice.tetragonal(a, c)
    elif spacegroup >= 16:
        lattice = Lattice.orthorhombic(a, b, c)
    elif spacegroup >= 3:
        lattice = Lattice.monoclinic(a, b, c, rng.uniform(95, 115))
    else:
        lattice = Lattice.from_parameters(a, b, c, *rng.uniform(75, 105, 3))
    special = np.array([0, 0.25, 0.5])
    mixed = np.where(rng.random(3) < 0.5, rng.choice(special, 3), rng.random(3))
    sites = np.array([rng.choice(special, 3), mixed])
    if spacegroup < 195:
        sites = np.vstack([sites, rng.random(3)])
    else:  # one parameter at most: positions of three have up to 192 atoms
        sites[1] = rng.choice(special) + rng.choice([0, 1], 3) * rng.random()
    species = rng.choice(["Na", "Cl", "Fe", "O", "U"], len(sites), replace=False).tolist()
    crystal = Structure.from_spacegroup(spacegroup, lattice, species, sites)
    assume(len(crystal) <= 60 and (crystal.distance_matrix + 9 * np.eye(len(crystal))).min() > 0.3)
    return crystal


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
