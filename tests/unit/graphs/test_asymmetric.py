import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from castbench.graphs.asymmetric import AsymmetricUnit, asymmetric_unit


def unit_of(structure: Structure) -> AsymmetricUnit:
    numbers = np.array(structure.atomic_numbers)
    return asymmetric_unit(structure.lattice.matrix, structure.frac_coords, numbers, 1e-4)


@pytest.mark.parametrize(
    ("name", "spacegroup", "multiplicities"),
    [
        ("rocksalt", 225, [4, 4]),
        ("fcc", 225, [4]),
        ("caesium chloride", 221, [1, 1]),
        ("diamond", 227, [8]),
        ("perovskite", 221, [1, 1, 3]),
        ("wurtzite", 186, [2, 2]),
        ("quartz", 154, [3, 6]),
    ],
)
def test_orbits_of_textbook_crystals(prototypes, name, spacegroup, multiplicities):
    structure = prototypes[name]
    unit = unit_of(structure)
    assert unit.spacegroup == spacegroup
    assert unit.multiplicities.tolist() == multiplicities
    assert unit.atomic_numbers.tolist() == list(dict.fromkeys(structure.atomic_numbers))
    assert len(unit.orbits) * structure.volume == pytest.approx(
        len(structure) * np.linalg.det(unit.lattice), rel=1e-6
    )
    share = np.bincount(unit.orbits) / len(unit.orbits)
    assert np.allclose(share, np.array(multiplicities) / sum(multiplicities))
    assert unit.orbits[unit.representatives].tolist() == list(range(len(multiplicities)))
    assert ((unit.positions >= 0) & (unit.positions < 1)).all()


@pytest.mark.parametrize("name", ["rocksalt", "diamond", "quartz"])
def test_multiplicities_are_of_the_conventional_cell_whatever_cell_is_given(prototypes, name):
    for given in (prototypes[name].get_primitive_structure(), prototypes[name] * (2, 1, 3)):
        assert unit_of(given).multiplicities.tolist() == unit_of(prototypes[name]).multiplicities.tolist()


def test_equivalent_elements_on_inequivalent_sites_stay_apart():
    sites = [[0, 0, 0], [0.625, 0.625, 0.625], [0.3875, 0.3875, 0.3875]]
    spinel = Structure.from_spacegroup(227, Lattice.cubic(8.08), ["Mg", "Al", "O"], sites)
    spinel.replace_species({"Al": "Mg"})
    unit = unit_of(spinel)
    assert sorted(zip(unit.atomic_numbers.tolist(), unit.multiplicities.tolist(), strict=True)) == [
        (8, 32), (12, 8), (12, 16),
    ]  # fmt: skip


def test_a_nearly_cubic_cell_keeps_its_shape():
    # Unlike the reference on purpose: its angle tolerance of 5 degrees makes this cubic, and larger.
    sheared = Structure(Lattice.from_parameters(3, 3, 3, 88, 88, 88), ["Po"], [[0, 0, 0]])
    unit = unit_of(sheared)
    assert unit.spacegroup == 166
    assert np.linalg.det(unit.lattice) / len(unit.orbits) == pytest.approx(sheared.volume, rel=1e-9)


def test_distortions_within_symprec_are_smoothed_out(prototypes):
    shaken = prototypes["perovskite"].copy()
    shaken.translate_sites([2], [1e-5, 0, 0])
    assert unit_of(shaken).spacegroup == 221
    shaken.translate_sites([2], [1e-3, 0, 0])
    assert unit_of(shaken).spacegroup != 221


def test_without_symmetry_the_input_cell_is_used_as_it_is():
    lattice = np.array([[3.0, 0, 0], [0.2, 4, 0], [0.1, 0.3, 5]])
    positions = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.30001], [1.6, -0.3, 0.8]])  # spglib refuses it
    unit = asymmetric_unit(lattice, positions, np.array([6, 6, 7]), 1e-4)
    assert unit.spacegroup == 1
    assert unit.multiplicities.tolist() == [1, 1, 1]
    assert np.array_equal(unit.lattice, lattice)
    assert np.allclose(unit.positions[2], [0.6, 0.7, 0.8])
