"""Crystals, ideal and crooked, as robocrystallographer's condenser hands them on."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from castbench.text.robocrystallographer import import_package

import_package()


@pytest.fixture(autouse=True)
def quiet():
    """pymatgen warns of missing oxidation states and radii for each pair of atoms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rocksalt() -> Structure:
    return Structure.from_spacegroup("Fm-3m", np.eye(3) * 5.64, ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def perovskite() -> Structure:
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    return Structure.from_spacegroup("Pm-3m", np.eye(3) * 3.9, ["Sr2+", "Ti4+", "O2-"], sites)


def layered() -> Structure:
    lattice = Lattice.hexagonal(3.19, 12.3)
    sites = [[1 / 3, 2 / 3, 0.25], [1 / 3, 2 / 3, 0.621]]
    return Structure.from_spacegroup("P6_3/mmc", lattice, ["Mo4+", "S2-"], sites)


def metal() -> Structure:
    return Structure.from_spacegroup("Fm-3m", np.eye(3) * 3.61, ["Cu"], [[0, 0, 0]])


def crooked() -> Structure:
    """No symmetry, elements without electronegativity or radius among them."""
    rng = np.random.default_rng(7)
    lattice = np.diag([6.0, 6.5, 7.0]) + rng.uniform(-0.6, 0.6, (3, 3))
    grid = np.array([[i, j, k] for i in (0, 0.5) for j in (0, 0.5) for k in (0, 0.5)])
    species = ["Ba2+", "Si4+", "O2-", "O2-", "N3-", "H+", "Kr", "La3+"]
    return Structure(lattice, species, grid + rng.uniform(-0.08, 0.08, (8, 3)))


@pytest.fixture(params=[rocksalt, perovskite, layered, metal, crooked], ids=lambda make: make.__name__)
def structure(request: pytest.FixtureRequest) -> Structure:
    make: Callable[[], Structure] = request.param
    return make()
