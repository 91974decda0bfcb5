"""The asymmetric unit of a crystal: one atom of each set of equivalent atoms (spec/models.md 1.1)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import spglib


@dataclass(frozen=True)
class AsymmetricUnit:
    """A cell of n atoms in m orbits.

    Attributes:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        orbits: (n,) orbit of each atom, 0..m-1, in order of the orbit's first atom in the input.
        representatives: (m,) one atom of each orbit.
        atomic_numbers: (m,) element of each orbit.
        multiplicities: (m,) atoms of each orbit in the cell.
        spacegroup: international number, 1 where no symmetry was found.
    """

    lattice: np.ndarray
    positions: np.ndarray
    orbits: np.ndarray
    representatives: np.ndarray
    atomic_numbers: np.ndarray
    multiplicities: np.ndarray
    spacegroup: int


def asymmetric_unit(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> AsymmetricUnit:
    """Orbits of the idealised conventional cell; where spglib fails, each atom of the input cell is an orbit.

    The idealised cell makes symmetry-equal distances equal to rounding error, so that shells of neighbours
    are told apart exactly, and does not depend on which cell of the crystal was given.

    The reference lets angles deviate by 5 degrees whatever `symprec` says. Then a rhombohedral cell of 88
    degrees becomes cubic and loses its geometry, so here angles are held to `symprec` as lengths are.

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        atomic_numbers: (n,) elements.
        symprec: distance tolerance of the symmetry search, angstrom.
    """
    dataset = None
    with suppress(spglib.SpglibError):  # spglib before 2.9 returns None instead
        cell: Any = (lattice, positions, atomic_numbers)  # spglib's hints know lists only
        dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    if dataset is None:
        n = len(atomic_numbers)
        everyone, ones = np.arange(n), np.ones(n, dtype=int)
        return AsymmetricUnit(lattice, positions % 1.0, everyone, everyone, atomic_numbers, ones, 1)
    # spglib names orbits by atoms of the input cell; both cells map onto the same primitive cell.
    orbit_of_primitive = np.empty(dataset.mapping_to_primitive.max() + 1, dtype=int)
    orbit_of_primitive[dataset.mapping_to_primitive] = dataset.crystallographic_orbits
    _, representatives, orbits, multiplicities = np.unique(
        orbit_of_primitive[dataset.std_mapping_to_primitive],
        return_index=True, return_inverse=True, return_counts=True,
    )  # fmt: skip
    return AsymmetricUnit(
        lattice=dataset.std_lattice,
        positions=dataset.std_positions % 1.0,
        orbits=orbits,
        representatives=representatives,
        atomic_numbers=dataset.std_types[representatives],
        multiplicities=multiplicities,
        spacegroup=dataset.number,
    )
