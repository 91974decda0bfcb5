import numpy as np
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from castbench.graphs.cubic import NotCubicError, _integer_basis, _lattice_rotations, cubic_cell


def cell_of(structure: Structure, symprec: float = 1e-4):
    numbers = np.array(structure.atomic_numbers)
    return cubic_cell(structure.lattice.matrix, structure.frac_coords, numbers, symprec)


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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(spacegroup=st.integers(195, 230), seed=st.integers(0, 10**6))
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


def test_the_crystal_is_that_of_spglib(graph_of, edges_of, prototypes, monkeypatch):
    names = ("rocksalt", "diamond", "perovskite")
    given = {name: prototypes[name] * (1, 1, 1) for name in names}
    given |= {f"primitive {name}": prototypes[name].get_primitive_structure() for name in names}
    left = Lattice(-prototypes["diamond"].lattice.matrix)
    given["left-handed"] = Structure(left, prototypes["diamond"].species, prototypes["diamond"].frac_coords)
    fast = {name: (cell_of(structure).spacegroup, graph_of(structure)) for name, structure in given.items()}

    def refuse(*_):
        raise NotCubicError

    monkeypatch.setattr("castbench.graphs.asymmetric.cubic_cell", refuse)
    for name, structure in given.items():
        spacegroup, graph = fast[name]
        slow = graph_of(structure)
        assert spacegroup == slow.spacegroup
        assert graph.multiplicities.tolist() == slow.multiplicities.tolist()
        assert np.allclose(edges_of(graph), edges_of(slow), rtol=0, atol=1e-6)


def test_a_chiral_crystal_keeps_its_hand():
    # Space groups 212 and 213 are mirror images of each other.
    right = Structure.from_spacegroup(213, Lattice.cubic(6.3), ["Mn"], [[0.0636, 0.0636, 0.0636]])
    mirrored = Structure(right.lattice, right.species, -right.frac_coords)
    assert [cell_of(right).spacegroup, cell_of(mirrored).spacegroup] == [213, 212]
    left_handed = Structure(
        Lattice(right.lattice.matrix[[1, 0, 2]]), right.species, right.frac_coords[:, [1, 0, 2]]
    )
    assert cell_of(left_handed).spacegroup == 213


@pytest.mark.parametrize("shift", [1e-5, 1e-4, 1.5e-4])
def test_a_crystal_that_is_noisy_or_at_the_edge_of_the_tolerance_is_refused(prototypes, shift):
    noisy = prototypes["perovskite"].copy()
    noisy.translate_sites([2], [shift, 0, 0], frac_coords=False)
    with pytest.raises(NotCubicError):
        cell_of(noisy)


@pytest.mark.parametrize("name", ["wurtzite", "quartz"])
def test_what_is_not_cubic_is_refused(prototypes, name):
    with pytest.raises(NotCubicError, match="edges"):
        cell_of(prototypes[name])


def test_less_symmetry_in_a_cubic_lattice_is_refused(prototypes):
    layered = prototypes["rocksalt"].copy()
    layered[0], layered[1] = "K", "K"
    with pytest.raises(NotCubicError):
        cell_of(layered)


def test_two_atoms_in_one_place_are_refused():
    with pytest.raises(NotCubicError):
        cubic_cell(np.eye(3) * 4, np.array([[0, 0, 0], [0, 0, 1e-5]]), np.array([6, 6]), 1e-4)
