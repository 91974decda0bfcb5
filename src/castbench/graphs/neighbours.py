"""coGN's graph of a crystal: its asymmetric unit, joined by nearest neighbours (spec/models.md 1.1)."""

from dataclasses import dataclass

import numpy as np
from pymatgen.optimization.neighbors import find_points_in_spheres

from castbench.graphs.asymmetric import asymmetric_unit

# Distances closer than this are one shell, angstrom. Symmetry-equal distances of an idealised cell differ by
# 1e-12; of 11,000 nodes of real crystals none has a gap between 1e-9, which the reference takes, and 1e-7.
TIE = 1e-7
PERIODIC = np.ones(3, dtype=np.int64)


@dataclass(frozen=True)
class CrystalGraph:
    """Asymmetric-unit graph of n nodes and e edges, from a neighbour (source) to a centre (target).

    Attributes:
        atomic_numbers: (n,) uint8.
        multiplicities: (n,) float32, atoms of the conventional cell that a node stands for.
        edge_source, edge_target: (e,) int32, sorted by target, then source, then distance.
        distances: (e,) float32, angstrom.
        edge_multiplicities: (e,) float32, parallel edges that an edge stands for.
        spacegroup: international number; packed graphs keep it in their index alone.
    """

    atomic_numbers: np.ndarray
    multiplicities: np.ndarray
    edge_source: np.ndarray
    edge_target: np.ndarray
    distances: np.ndarray
    edge_multiplicities: np.ndarray
    spacegroup: int | None = None


def nearest_neighbours(
    lattice: np.ndarray, positions: np.ndarray, centres: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each centre, its k nearest periodic neighbours and all that tie with the k-th, itself left out.

    The search radius starts where a crystal of this density holds about 2k atoms and grows until every centre
    has its k, anew each time. (The reference appends a second search to what the first had found.)

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates in [0, 1).
        centres: (m,) atoms to search around.
        k: neighbours wanted.

    Returns:
        Of each of p pairs: row of `centres`, neighbouring atom (both int), distance (float64, angstrom).
    """
    volume = abs(np.linalg.det(lattice))
    atoms = np.ascontiguousarray(positions @ lattice)
    lattice = np.ascontiguousarray(lattice, dtype=float)
    # Capped: a slab or a molecule in vacuum has a low mean density, but neighbours nearby.
    radius = min((1.5 * k * volume / (np.pi * len(atoms))) ** (1 / 3), 2.0 * k ** (1 / 3) + 2.0)
    while True:
        centre, atom, image, distance = find_points_in_spheres(
            atoms, atoms[centres], r=radius, pbc=PERIODIC, lattice=lattice
        )
        others = (atom != centres[centre]) | image.any(axis=1)
        centre, atom, distance = centre[others], atom[others], distance[others]
        # A shell at the very edge of the sphere may be cut in two.
        if np.bincount(centre[distance < radius - TIE], minlength=len(centres)).min() >= k:
            break
        radius *= 1.25
    order = np.lexsort((distance, centre))
    centre, atom, distance = centre[order], atom[order], distance[order]
    first = np.searchsorted(centre, np.arange(len(centres)))
    kept = distance <= distance[first + k - 1][centre] + TIE
    return centre[kept], atom[kept], distance[kept]


def crystal_graph(
    lattice: np.ndarray,
    positions: np.ndarray,
    atomic_numbers: np.ndarray,
    neighbours: int = 24,
    symprec: float = 1e-4,
) -> CrystalGraph:
    """Build coGN's graph of a crystal (reference: kgcnn 3.0.0, KNN asymmetric-unit cell).

    Only atoms of the asymmetric unit receive edges: all atoms of an orbit see the same surroundings, hence
    have the same state, and the mean over nodes weighted by multiplicity is the mean over the whole cell.

    A message depends on (source, target, distance) alone and messages are summed, so edges equal in all
    three are stored once with their count: messages weighted by it add up to those of the reference's
    multigraph.

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        atomic_numbers: (n,) elements.
        neighbours: neighbours of each node, at least; all that tie with the last are kept.
        symprec: distance tolerance of the symmetry search, angstrom.

    Raises:
        ValueError: the cell is empty or flat, lengths differ, a number is not finite, or two atoms are
            closer than `symprec`.
    """
    if not len(atomic_numbers):
        raise ValueError("no atoms")
    if len(positions) != len(atomic_numbers):
        raise ValueError("species and coordinates are of different lengths")
    if not (np.isfinite(lattice).all() and np.isfinite(positions).all()):
        raise ValueError("lattice or coordinates are not finite")
    if abs(np.linalg.det(lattice)) < 1e-3:
        raise ValueError("the cell has no volume")
    unit = asymmetric_unit(lattice, positions, atomic_numbers, symprec)
    centres = unit.representatives
    target, atom, distance = nearest_neighbours(unit.lattice, unit.positions, centres, neighbours)
    if distance.min() < symprec:
        raise ValueError("two atoms are in one place")
    source = unit.orbits[atom]
    order = np.lexsort((distance, source, target))
    source, target, distance = source[order], target[order], distance[order]
    different = (np.diff(source) != 0) | (np.diff(target) != 0) | (np.diff(distance) > TIE)
    first = np.flatnonzero(np.concatenate(([True], different)))
    return CrystalGraph(
        atomic_numbers=unit.atomic_numbers.astype(np.uint8),
        multiplicities=unit.multiplicities.astype(np.float32),
        edge_source=source[first].astype(np.int32),
        edge_target=target[first].astype(np.int32),
        distances=distance[first].astype(np.float32),
        edge_multiplicities=np.diff(first, append=len(distance)).astype(np.float32),
        spacegroup=unit.spacegroup,
    )
