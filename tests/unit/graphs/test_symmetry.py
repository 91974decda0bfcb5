import numpy as np
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from castbench.graphs.symmetry import NoSymmetryError, _integer_basis, _lattice_rotations, symmetric_cell


def cell_of(structure: Structure, symprec: float = 1e-4):
    numbers = np.array(structure.atomic_numbers)
    return symmetric_cell(structure.lattice.matrix, structure.frac_coords, numbers, symprec)


@pytest.mark.parametrize(
    ("lattice", "order"),
    [
        (Lattice.cubic(4), 48),
        (Lattice([[0, 2, 2], [2, 0, 2], [2, 2, 0]]), 48),
        (Lattice.hexagonal(3, 5), 24),
        (Lattice.tetragonal(3, 5), 16),
        (Lattice.rhombohedral(4, 70), 12),
        (Lattice.orthorhombic(3, 4, 5), 8),
        (Lattice.monoclinic(3, 4, 5, 100), 4),
        (Lattice.from_parameters(3, 4, 5, 80, 85, 95), 2),
        (Lattice.from_parameters(3, 3, 3, 90.01, 90.01, 90.01), 12),
    ],
)
def test_rotations_of_lattices(lattice, order):
    reduced = spglib.niggli_reduce(lattice.matrix)
    rotations = _lattice_rotations(reduced, 1e-4)
    assert len(rotations) == order
    metric = reduced @ reduced.T
    assert np.allclose(rotations @ metric @ rotations.transpose(0, 2, 1), metric)


@pytest.mark.parametrize(
    ("rows", "determinant"),
    [
        ([[0, 0, 0]], 1000),
        ([[5, 5, 5]], 500),
        ([[5, 5, 0], [5, 0, 5], [0, 5, 5]], 250),
        ([[-3, 4, 7], [10, -6, 4]], 20),
    ],
)
def test_integer_vectors_get_a_basis(rows, determinant):
    everything = rows + (10 * np.eye(3, dtype=int)).tolist()
    basis = _integer_basis(everything)
    assert abs(round(np.linalg.det(basis))) == determinant
    shares = np.array(everything) @ np.linalg.inv(basis)
    assert np.allclose(shares, shares.round())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spacegroup=st.integers(1, 230), seed=st.integers(0, 10**6))
def test_space_groups_and_orbits_are_those_of_spglib(random_crystal, spacegroup, seed):
    structure = random_crystal(spacegroup, seed)
    cell = cell_of(structure)
    numbers = structure.atomic_numbers
    dataset = spglib.get_symmetry_dataset(
        (structure.lattice.matrix, structure.frac_coords, numbers), symprec=1e-4
    )
    assert cell.spacegroup == dataset.number
    orbits = np.unique(cell.orbits, return_counts=True)[1] * cell.centring
    expected = np.unique(dataset.crystallographic_orbits, return_counts=True)[1]
    assert sorted(orbits) == sorted(expected * len(dataset.std_types) // len(structure))
    assert [numbers[atom] for atom in cell.atoms] == [numbers[atom] for atom in cell.atoms[cell.orbits]]
    assert np.linalg.det(cell.lattice) * len(structure) == pytest.approx(structure.volume * len(cell.atoms))


def test_noise_within_the_tolerance_is_averaged_out(prototypes):
    rng = np.random.default_rng(0)
    for name in ("perovskite", "diamond", "quartz"):
        noisy = prototypes[name] * (1, 2, 1)
        for i in range(len(noisy)):
            noisy.translate_sites([i], rng.normal(0, 1e-5, 3), frac_coords=False)
        cell = cell_of(noisy, 1e-3)
        assert cell.spacegroup == cell_of(prototypes[name]).spacegroup
        again = symmetric_cell(
            cell.lattice, cell.positions, np.array(noisy.atomic_numbers)[cell.atoms], 1e-10
        )
        assert again.spacegroup == cell.spacegroup  # symmetric to the last digits


def test_what_is_no_group_is_refused():
    # Three atoms on a line, each within the tolerance of the next place: translations that do not add up.
    with pytest.raises(NoSymmetryError):
        symmetric_cell(np.eye(3) * 4, np.array([[0, 0, 0], [0, 0, 1e-5]]), np.array([6, 6]), 1e-4)
