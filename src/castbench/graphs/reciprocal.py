"""ALIGNN's graph: nearest neighbours made mutual, with the directions that its line graph needs.

Choudhary and DeCost, npj Comput. Mater. 7, 185 (2021): every atom is joined with its 12 nearest and all that
tie with the 12th, and each bond is there in both directions.

ALIGNN updates a bond from a neighbour to a centre by the bonds into the neighbour. On the asymmetric unit
the neighbour may be a copy of a node: a symmetry operation that takes it to the node takes the bond, seen
from its other end, to one of the node's own bonds, its `edge_reverse`. Angles at the node are the same.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import spglib
from scipy.spatial import cKDTree

from castbench.graphs.asymmetric import AsymmetricUnit
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.neighbours import TIE, directed, pairs_with_nearest, vectors_of

SAME = 1e-3  # angstrom; directions further apart than this are different neighbours
APART = 1e3  # angstrom; between the nodes' neighbours in one search tree


def reciprocal_graph(unit: AsymmetricUnit, neighbours: int, symprec: float) -> CrystalGraph:
    """The mutual graph of a crystal: i and j are joined where either is among the nearest of the other.

    Every bond is counted once a direction. (The reference counts that of an atom with its own image twice,
    and so gives a supercell other values.)

    Args:
        unit: of the crystal.
        neighbours: nearest neighbours of a node, at least; all that tie with the last are kept.
        symprec: distance tolerance of the symmetry search, angstrom.

    Raises:
        ValueError: two atoms are closer than `symprec`.
    """
    rotations = to_representatives(unit, symprec)
    if rotations is None:  # symmetry that cannot be told twice alike is not used
        unit = every_atom(unit)
        rotations = np.tile(np.eye(3), (len(unit.orbits), 1, 1))
    pairs, last = pairs_with_nearest(unit.lattice, unit.positions, unit.representatives, neighbours)
    reach = np.maximum(last[pairs.centre], last[unit.orbits[pairs.atom]])
    pairs = pairs[pairs.distance <= reach + TIE]
    graph, order = directed(unit, pairs, symprec)
    vectors = vectors_of(unit, pairs[order])
    seen_back = -np.einsum("ei,eij->ej", vectors, rotations[pairs.atom[order]])
    tree = cKDTree(np.column_stack([vectors, graph.edge_target * APART]))
    distance, reverse = tree.query(np.column_stack([seen_back, graph.edge_source * APART]))
    if distance.max() > SAME:
        raise ValueError("a bond has no reverse")
    return replace(graph, edge_reverse=reverse.astype(np.int32))


def every_atom(unit: AsymmetricUnit) -> AsymmetricUnit:
    """The same cell with every atom an orbit of its own."""
    n, numbers = len(unit.orbits), unit.atomic_numbers[unit.orbits]
    copies = np.full(n, unit.multiplicities.sum() / n)  # the cell is the conventional one, or primitive
    return replace(
        unit, orbits=np.arange(n), representatives=np.arange(n), atomic_numbers=numbers, multiplicities=copies
    )


def to_representatives(unit: AsymmetricUnit, symprec: float) -> np.ndarray | None:
    """Cartesian rotations (n, 3, 3), of row vectors, of operations that take each atom to its representative.

    None where the operations that spglib finds do not make up the orbits.
    """
    n, wanted = len(unit.orbits), unit.positions[unit.representatives[unit.orbits]]
    if len(unit.representatives) == n:
        return np.tile(np.eye(3), (n, 1, 1))
    try:
        cell: Any = (unit.lattice, unit.positions, unit.atomic_numbers[unit.orbits])  # hints know lists only
        found = spglib.get_symmetry(cell, symprec=symprec)
    except spglib.SpglibError:
        found = None
    if found is None:
        return None
    rotations = found["rotations"].transpose(0, 2, 1).astype(float)  # of row vectors
    off = unit.positions @ rotations + found["translations"][:, None] - wanted
    off = np.linalg.norm((off - np.rint(off)) @ unit.lattice, axis=-1)
    best = off.argmin(axis=0)
    if off[best, np.arange(n)].max() > symprec:
        return None
    return (np.linalg.inv(unit.lattice) @ rotations @ unit.lattice)[best]
