"""Neighbours, weights and fingerprints equal those of pymatgen's CrystalNN, neighbours to the bit."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.core.local_env import CrystalNN
from robocrys.condense.fingerprint import get_site_fingerprints

from castbench.text.robocrystallographer import environments as module
from castbench.text.robocrystallographer.environments import Environments, environments


def test_neighbours_equal_crystalnns(structure: Structure):
    for n, found in enumerate(Environments(structure).sites):
        stock = CrystalNN().get_nn_data(structure, n)
        assert found.cn_weights == stock.cn_weights
        assert found.sites.tolist() == [entry["site_index"] for entry in stock.all_nninfo]
        assert found.images.tolist() == [list(entry["image"]) for entry in stock.all_nninfo]
        coords = [entry["site"].coords - structure[n].coords for entry in stock.all_nninfo]
        assert (found.vectors == np.reshape(coords, (-1, 3))).all()
        bonded = CrystalNN().get_nn_info(structure, n)
        assert found.bonded == len(bonded)


def test_fingerprints_equal_matminers(structure: Structure):
    stock = get_site_fingerprints(structure, as_dict=False)
    # A bond-orientational order of 0 is the root of what rounding leaves: 1e-8 here, 1e-17 there.
    assert Environments(structure).fingerprints == pytest.approx(stock, abs=1e-7)


def test_an_atom_alone_has_no_neighbour():
    alone = Structure(Lattice.cubic(9.0), ["Ar"], [[0, 0, 0]])
    (found,) = Environments(alone).sites
    assert found.cn_weights == CrystalNN().get_nn_data(alone, 0).cn_weights == {0: 1.0}
    assert found.bonded == 0 and len(found.sites) == 0


def test_an_element_without_a_radius_fails_as_in_pymatgen():
    strange = Structure(Lattice.cubic(3.0), ["Og", "Og"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for look in (Environments, lambda structure: CrystalNN().get_nn_data(structure, 0)):
        with pytest.raises(TypeError):
            look(strange)


def test_a_structure_is_looked_at_once_and_only_the_last_two_are_kept(structure: Structure):
    first = environments(structure)
    assert environments(structure) is first
    for _ in range(2):
        environments(structure.copy())
    assert environments(structure) is not first
    assert len(module._recent) == 2
