"""Crystals as graphs of their asymmetric unit, joined by nearest neighbours or within a radius."""

from dataclasses import dataclass, replace

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres

from castbench.graphs.asymmetric import AsymmetricUnit, asymmetric_unit
from castbench.graphs.crystal_graph import CrystalGraph

# Distances closer than this are one shell, angstrom. Symmetry-equal distances of an idealised cell differ by
# 1e-12; of 11,000 nodes of real crystals none has a gap between 1e-9, which the reference takes, and 1e-7.
TIE = 1e-7
PERIODIC = np.ones(3, dtype=np.int64)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a centre and a neighbour.

    Attributes:
        centre: (p,) row of the list of centres.
        atom: (p,) neighbouring atom of the cell.
        image: (p, 3) cell that it is in.
        distance: (p,) float64, angstrom.
    """

    centre: np.ndarray
    atom: np.ndarray
    image: np.ndarray
    distance: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Pairs":
        return Pairs(self.centre[rows], self.atom[rows], self.image[rows], self.distance[rows])


def pairs_within(lattice: np.ndarray, positions: np.ndarray, centres: np.ndarray, radius: float) -> Pairs:
    """Periodic neighbours of the atoms `centres` (m,) within `radius`, themselves left out; in no order."""
    lattice = np.ascontiguousarray(lattice, dtype=float)
    atoms = np.ascontiguousarray(positions @ lattice)
    centre, atom, image, distance = find_points_in_spheres(
        atoms, atoms[centres], r=radius, pbc=PERIODIC, lattice=lattice
    )
    others = (atom != centres[centre]) | image.any(axis=1)
    return Pairs(centre, atom, image, distance)[others]


def pairs_with_nearest(
    lattice: np.ndarray, positions: np.ndarray, centres: np.ndarray, k: int
) -> tuple[Pairs, np.ndarray]:
    """Sorted by centre and distance, the neighbours in a sphere that holds the shell of each centre's k-th,
    and the distance of that (m,).

    The search radius starts where a crystal of this density holds about 2k atoms and grows until every centre
    has its k, anew each time. (The reference appends a second search to what the first had found.)
    """
    volume = abs(np.linalg.det(lattice))
    # Capped: a slab or a molecule in vacuum has a low mean density, but neighbours nearby.
    radius = min((1.5 * k * volume / (np.pi * len(positions))) ** (1 / 3), 2.0 * k ** (1 / 3) + 2.0)
    while True:
        pairs = pairs_within(lattice, positions, centres, radius)
        # A shell at the very edge of the sphere may be cut in two.
        inside = pairs.centre[pairs.distance < radius - TIE]
        if np.bincount(inside, minlength=len(centres)).min() >= k:
            break
        radius *= 1.25
    pairs = pairs[np.lexsort((pairs.distance, pairs.centre))]
    first = np.searchsorted(pairs.centre, np.arange(len(centres)))
    return pairs, pairs.distance[first + k - 1]


def nearest_pairs(lattice: np.ndarray, positions: np.ndarray, centres: np.ndarray, k: int) -> Pairs:
    """Each centre's k nearest periodic neighbours and all that tie with the k-th, itself left out.

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates in [0, 1).
        centres: (m,) atoms to search around.
        k: neighbours wanted.
    """
    pairs, last = pairs_with_nearest(lattice, positions, centres, k)
    return pairs[pairs.distance <= last[pairs.centre] + TIE]


def unit_of(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> AsymmetricUnit:
    """The asymmetric unit of a crystal.

    Raises:
        ValueError: the cell is empty or flat, lengths differ, a number is not finite.
    """
    if not len(atomic_numbers):
        raise ValueError("no atoms")
    if len(positions) != len(atomic_numbers):
        raise ValueError("species and coordinates are of different lengths")
    if not (np.isfinite(lattice).all() and np.isfinite(positions).all()):
        raise ValueError("lattice or coordinates are not finite")
    if abs(np.linalg.det(lattice)) < 1e-3:
        raise ValueError("the cell has no volume")
    return asymmetric_unit(lattice, positions, atomic_numbers, symprec)


def vectors_of(unit: AsymmetricUnit, pairs: Pairs) -> np.ndarray:
    """Vectors (p, 3) from each centre, a representative of the unit, to its neighbour, angstrom."""
    centres = unit.representatives[pairs.centre]
    return (unit.positions[pairs.atom] + pairs.image - unit.positions[centres]) @ unit.lattice


def directed(unit: AsymmetricUnit, pairs: Pairs, symprec: float) -> tuple[CrystalGraph, np.ndarray]:
    """The graph with an edge for each pair, with its vector, and the order (p,) of the pairs in it.

    Raises:
        ValueError: two atoms are closer than `symprec`.
    """
    if pairs.distance.min() < symprec:
        raise ValueError("two atoms are in one place")
    source = unit.orbits[pairs.atom]
    order = np.lexsort((pairs.distance, source, pairs.centre))
    graph = CrystalGraph(
        atomic_numbers=unit.atomic_numbers.astype(np.uint8),
        multiplicities=unit.multiplicities.astype(np.float32),
        edge_source=source[order].astype(np.int32),
        edge_target=pairs.centre[order].astype(np.int32),
        distances=pairs.distance[order].astype(np.float32),
        edge_multiplicities=np.ones(len(order), np.float32),
        spacegroup=unit.spacegroup,
        vectors=vectors_of(unit, pairs[order]).astype(np.float32),
    )
    return graph, order


def merged(unit: AsymmetricUnit, pairs: Pairs, symprec: float) -> CrystalGraph:
    """The graph with an edge for each pair, parallel ones of one length merged and counted.

    Where a message depends on (source, target, distance) alone and messages are summed, those of merged
    edges, weighted by their counts, add up to those of the multigraph.

    Raises:
        ValueError: two atoms are closer than `symprec`.
    """
    graph, order = directed(unit, pairs, symprec)
    different = np.diff(graph.edge_source).astype(bool) | np.diff(graph.edge_target).astype(bool)
    different |= np.diff(pairs.distance[order]) > TIE
    first = np.flatnonzero(np.concatenate(([True], different)))
    return replace(
        graph,
        edge_source=graph.edge_source[first],
        edge_target=graph.edge_target[first],
        distances=graph.distances[first],
        edge_multiplicities=np.diff(first, append=len(order)).astype(np.float32),
        vectors=None,
    )


def nearest_graph(unit: AsymmetricUnit, neighbours: int, symprec: float) -> CrystalGraph:
    """coGN's graph (reference: kgcnn 3.0.0, KNN asymmetric-unit cell; spec/models.md 1.1).

    Args:
        unit: of the crystal.
        neighbours: neighbours of each node, at least; all that tie with the last are kept.
        symprec: distance tolerance of the symmetry search, angstrom.

    Raises:
        ValueError: two atoms are closer than `symprec`.
    """
    pairs = nearest_pairs(unit.lattice, unit.positions, unit.representatives, neighbours)
    return merged(unit, pairs, symprec)


def radius_graph(unit: AsymmetricUnit, radius: float, symprec: float) -> CrystalGraph:
    """The graph of all neighbours within `radius`, angstrom, to 1e-7; a lone atom gets its nearest shell.

    (MEGNet's reference refuses a crystal with a lone atom.)
    """
    _, nearest = pairs_with_nearest(unit.lattice, unit.positions, unit.representatives, 1)
    reach = np.maximum(radius, nearest) + TIE
    pairs = pairs_within(unit.lattice, unit.positions, unit.representatives, reach.max())
    return merged(unit, pairs[pairs.distance <= reach[pairs.centre]], symprec)
