import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from castbench.materials.structures import (
    OVERLAP,
    Crystal,
    RecordError,
    overlap,
    pack_crystals,
    prototype,
    read_crystal,
    symmetry,
    unpack_crystals,
)

from .conftest import make_cif

CUBE = np.eye(3) * 4.1
SALT = {"lattice": CUBE.tolist(), "species": ["Cs", "Cl"], "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5]]}
QUARTZ = Structure.from_spacegroup(
    "P3_221", Lattice.hexagonal(4.916, 5.4054), ["Si", "O"], [[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.7858]]
)


def reason(parts):
    with pytest.raises(RecordError) as caught:
        read_crystal(parts)
    return caught.value.reason


def same(one, other):
    """Equal crystals, but for the order of their atoms, which pymatgen's CIF reader changes."""
    assert sorted(one.species) == sorted(other.species)
    np.testing.assert_allclose(one.lattice, other.lattice, atol=1e-6)
    for symbol, position in zip(one.species, one.frac_coords, strict=True):
        of_its_kind = other.frac_coords[np.array(other.species) == symbol]
        delta = of_its_kind - position
        assert np.abs(delta - np.round(delta)).max(axis=1).min() < 1e-5


def test_every_form_of_a_structure_is_the_same_crystal(salt_cif):
    expected = Crystal(CUBE, ["Cs", "Cl"], np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    structure = Structure(CUBE, ["Cs", "Cl"], SALT["frac_coords"])
    forms = [
        SALT,
        {**SALT, "lattice": [4.1, 4.1, 4.1, 90, 90, 90]},
        {**SALT, "lattice": CUBE.ravel().tolist()},
        {**SALT, "lattice": structure.lattice.as_dict()},
        {key: json.dumps(value) for key, value in SALT.items()},
        {**SALT, "species": [55, 17]},
        {"structure": structure.as_dict()},
        {"structure": json.dumps(structure.as_dict())},
        {"structure": structure.add_oxidation_state_by_element({"Cs": 1, "Cl": -1}).as_dict()},
        {"structure": pack_crystals([expected])[0].as_py()},
        {"structure": salt_cif},
        {"cif": salt_cif},
        {"cif": structure.to(fmt="cif", symprec=0.01)},
    ]
    for form in forms:
        same(read_crystal(form), expected)


def test_cif_and_cell_parameters_of_a_trigonal_crystal_agree():
    cell = QUARTZ.lattice.parameters
    parts = {
        "lattice": cell,
        "species": [s.symbol for s in QUARTZ.species],
        "frac_coords": QUARTZ.frac_coords,
    }
    crystal = read_crystal({**parts, "lattice": list(cell), "frac_coords": QUARTZ.frac_coords.tolist()})
    same(crystal, read_crystal({"cif": QUARTZ.to(fmt="cif")}))
    assert crystal.formula == "SiO2"
    assert symmetry(crystal) == (154, (1, 2))


def test_isotopes_are_read_as_hydrogen():
    atoms = {"lattice": CUBE.tolist(), "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5], [0, 0.5, 0]]}
    assert read_crystal({**atoms, "species": ["D", "O", "T"]}).formula == "H2O"
    assert read_crystal({"cif": make_cif("D1 D 0 0 0 1", "Li1 Li 0.5 0.5 0.5 1")}).formula == "LiH"


@pytest.mark.parametrize(
    "cif",
    [
        "",
        "not a CIF",
        make_cif("Cs1 Cs 0 0 ? 1"),
        make_cif("Cs1 Cs 0 0 0 1", a="?"),
        "data_empty\n_cell_length_a 4\n",
    ],
)
def test_cif_that_does_not_parse(cif):
    assert reason({"cif": cif}) == ("unreadable structure" if cif else "missing structure")


@pytest.mark.parametrize(
    "parts",
    [
        {"cif": make_cif("Cs1 Cs 0 0 0 0.5", "Cl1 Cl 0.5 0.5 0.5 1")},
        {"cif": make_cif("Cs1 Cs 0 0 0 0.5", "K1 K 0 0 0 0.5", "Cl1 Cl 0.5 0.5 0.5 1")},
        {"structure": Structure(CUBE, [{"Cs": 0.5, "K": 0.5}, "Cl"], SALT["frac_coords"]).as_dict()},
        {"structure": Structure(CUBE, [{"Cs": 0.9}, "Cl"], SALT["frac_coords"]).as_dict()},
    ],
)
def test_disordered_structure(parts):
    assert reason(parts) == "disordered structure"


@pytest.mark.parametrize(
    "parts",
    [
        {**SALT, "species": ["Cs", "Xx"]},
        {**SALT, "species": ["Cs", "chlorine"]},
        {**SALT, "species": ["Cs", 119]},
        {**SALT, "species": ["Cs", None]},
        {"cif": make_cif("Xx1 Xx 0 0 0 1")},
    ],
)
def test_unknown_element(parts):
    assert reason(parts) == "unknown element"


@pytest.mark.parametrize(
    "parts",
    [
        {**SALT, "frac_coords": [[0, 0, 0], [0.05, 0.05, 0.05]]},
        {**SALT, "frac_coords": [[0.02, 0, 0], [0.98, 0, 0]]},  # through the face of the cell
        {**SALT, "frac_coords": [[0, 0, 0], [0, 0, 1]]},
        {"lattice": [0.4, 5, 5, 90, 90, 90], "species": ["Cs"], "frac_coords": [[0, 0, 0]]},  # its own image
        {"cif": make_cif("Cs1 Cs 0 0 0 1", "Cs2 Cs 0 0 0.00001 1")},  # pymatgen would merge them
        {"cif": make_cif("Cs1 Cs 0 0 0 1", "Cl1 Cl 0 0 0 1")},
    ],
)
def test_overlapping_atoms(parts):
    assert reason(parts) == "overlapping atoms"


@pytest.mark.parametrize(
    "parts",
    [
        {**SALT, "frac_coords": [[0, 0, 0]]},
        {**SALT, "frac_coords": [[0, 0, 0], [0.5, 0.5, math.nan]]},
        {**SALT, "frac_coords": [[0, 0, 0], [0.5, 0.5]]},
        {**SALT, "frac_coords": "[[0, 0, 0], [0.5"},
        {**SALT, "species": "CsCl"},
        {**SALT, "species": 2},
        {**SALT, "lattice": [4.1, 4.1, 4.1]},
        {**SALT, "lattice": [4.1, 4.1, 4.1, 90, 90, 180]},
        {**SALT, "lattice": [[1, 0, 0], [0, 1, 0], [1, 1, 0]]},
        {**SALT, "lattice": {"a": 4.1}},
        {"structure": {"lattice": SALT["lattice"], "sites": [{"abc": [0, 0, 0]}]}},
        {"structure": {"lattice": SALT["lattice"], "sites": [{"species": [{"element": "Cs", "occu": "?"}]}]}},
        {"structure": "{"},
    ],
)
def test_structure_that_makes_no_sense(parts):
    assert reason(parts) == "unreadable structure"


@pytest.mark.parametrize("parts", [{}, {**SALT, "lattice": None}, {**SALT, "species": [], "frac_coords": []}])
def test_missing_structure(parts):
    assert reason(parts) == "missing structure"


@settings(max_examples=60, deadline=None)
@given(
    cell=st.tuples(*[st.floats(0.45, 6)] * 3, *[st.floats(50, 95)] * 3),
    frac=st.lists(st.tuples(*[st.floats(-1, 2)] * 3), min_size=1, max_size=4),
)
def test_overlap_agrees_with_a_search_of_every_neighbour(cell, frac):
    lattice = Lattice.from_parameters(*cell)
    if lattice.volume < 0.3:
        return
    shortest = overlap(Crystal(np.asarray(lattice.matrix), ["H"] * len(frac), np.array(frac)))
    structure = Structure(lattice, ["H"] * len(frac), frac)
    # pymatgen leaves out neighbours at distance 0, so coincident atoms are looked for in its matrix too.
    lengths = list(structure.get_neighbor_list(OVERLAP, exclude_self=True)[3])
    lengths += list(structure.distance_matrix[np.triu_indices(len(frac), 1)])
    expected = min((length for length in lengths if length < OVERLAP - 1e-9), default=None)
    if expected is None:
        assert shortest is None or shortest == pytest.approx(OVERLAP, abs=1e-6)
    else:
        assert shortest == pytest.approx(expected, abs=1e-6)


def test_symmetry_does_not_depend_on_the_cell_chosen():
    rock_salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    cells = [rock_salt, rock_salt.get_primitive_structure()]
    crystals = [
        Crystal(np.asarray(c.lattice.matrix), [s.symbol for s in c.species], c.frac_coords) for c in cells
    ]
    assert [symmetry(crystal) for crystal in crystals] == [(225, (1, 1))] * 2
    assert prototype(crystals[0]) == prototype(crystals[1]) == "AB 225 1,1"


def test_prototype_tells_structures_apart_and_joins_substitutions():
    fluoride = read_crystal({**SALT, "species": ["K", "F"]})
    assert prototype(fluoride) == prototype(read_crystal(SALT))
    moved = read_crystal({**SALT, "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.4]]})
    assert prototype(moved) != prototype(fluoride)


def test_packed_crystals_come_back_from_any_slice():
    crystals = [read_crystal(SALT), read_crystal({"structure": QUARTZ.as_dict()}), read_crystal(SALT)]
    packed = pa.chunked_array([pack_crystals(crystals), pack_crystals(crystals[:1])])
    for one, other in zip(unpack_crystals(packed.slice(1)), crystals[1:] + crystals[:1], strict=True):
        assert one.species == other.species
        np.testing.assert_array_equal(one.lattice, other.lattice)
        np.testing.assert_array_equal(one.frac_coords, other.frac_coords)


def test_overlap_of_more_atoms_than_are_compared_at_once():
    grid = np.array(list(itertools.product(range(11), repeat=3))) / 11  # 1,331 atoms, 3 angstrom apart
    assert overlap(Crystal(np.eye(3) * 33, ["H"] * len(grid), grid)) is None
    grid[-1] = grid[0] + [0.01, 0, 0]
    assert overlap(Crystal(np.eye(3) * 33, ["H"] * len(grid), grid)) == pytest.approx(0.33)


def test_a_cif_goes_before_a_structure(salt_cif):
    other = {**SALT, "species": ["K", "F"]}
    assert read_crystal({"cif": salt_cif, "structure": other}).formula == "CsCl"


@pytest.mark.parametrize(("shift", "group"), [(0.0005, 221), (0.005, 99)])
def test_symmetry_is_that_within_a_hundredth_of_an_angstrom(shift, group):
    moved = read_crystal({**SALT, "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5 + shift]]})
    assert symmetry(moved)[0] == group
