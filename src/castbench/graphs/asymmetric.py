"""The asymmetric unit of a crystal: one atom of each set of equivalent atoms (spec/models.md 1.1)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib

from castbench.graphs.cubic import NotCubicError, cubic_cell


@dataclass(frozen=True)
class AsymmetricUnit:
    """A cell of n atoms in m orbits.

    Attributes:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates in [0, 1).
        orbits: (n,) orbit of each atom, 0..m-1, in order of the orbit's first atom in the input.
        representatives: (m,) one atom of each orbit.
        atomic_numbers: (m,) element of each orbit.
        multiplicities: (m,) atoms of each orbit in the conventional cell.
        centring: primitive cells in the conventional one.
        spacegroup: international number, 1 where no symmetry was found.
    """

    lattice: np.ndarray
    positions: np.ndarray
    orbits: np.ndarray
    representatives: np.ndarray
    atomic_numbers: np.ndarray
    multiplicities: np.ndarray
    centring: int
    spacegroup: int


def asymmetric_unit(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> AsymmetricUnit:
    """Orbits of the crystal made exactly symmetric; where that fails, each atom of the cell is an orbit.

    Symmetry-equal distances then are equal to rounding error, so that shells of neighbours are told apart,
    and do not depend on which cell of the crystal was given.

    The reference lets angles deviate by 5 degrees whatever `symprec` says. Then a rhombohedral cell of 88
    degrees becomes cubic and loses its geometry, so here angles are held to `symprec` as lengths are.

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        atomic_numbers: (n,) elements.
        symprec: distance tolerance of the symmetry search, angstrom.
    """
    with suppress(NotCubicError, spglib.SpglibError):
        cell = cubic_cell(lattice, positions, atomic_numbers, symprec)
        first_atoms = cell.atoms[cell.orbits]
        kept = cell.lattice, cell.positions, atomic_numbers[cell.atoms]
        return _unit(*kept, first_atoms, cell.centring, cell.centring, cell.spacegroup)
    dataset = None
    with suppress(spglib.SpglibError):  # spglib before 2.9 returns None instead
        given: Any = (lattice, positions, atomic_numbers)  # spglib's hints know lists only
        dataset = spglib.get_symmetry_dataset(given, symprec=symprec)
    if dataset is None:
        return _unit(lattice, positions, atomic_numbers, np.arange(len(atomic_numbers)), 1, 1, 1)
    # spglib names orbits by atoms of the input cell; both cells map onto the same primitive cell.
    orbits = np.empty(dataset.mapping_to_primitive.max() + 1, dtype=int)
    orbits[dataset.mapping_to_primitive] = dataset.crystallographic_orbits
    kept = dataset.std_lattice, dataset.std_positions, dataset.std_types
    centring = len(dataset.std_types) // len(orbits)
    return _unit(*kept, orbits[dataset.std_mapping_to_primitive], 1, centring, dataset.number)


def _unit(
    lattice: np.ndarray,
    positions: np.ndarray,
    atomic_numbers: np.ndarray,
    labels: np.ndarray,
    copies: int,
    centring: int,
    spacegroup: int,
) -> AsymmetricUnit:
    """Number the orbits in the order of their labels (n,); the conventional cell is `copies` of the given."""
    _, representatives, orbits, counts = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    return AsymmetricUnit(
        lattice=lattice,
        positions=positions % 1.0 % 1.0,  # -1e-17 % 1 is 1
        orbits=orbits,
        representatives=representatives,
        atomic_numbers=atomic_numbers[representatives],
        multiplicities=counts * copies,
        centring=centring,
        spacegroup=spacegroup,
    )
