"""Crystals for the tests: textbook ones, and random ones of any space group."""

import functools
import itertools
from typing import Any

import numpy as np
from hypothesis import assume
from pymatgen.core import Lattice, Structure

from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.kinds import structure_graph

COGN = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4}


def cogn_graph(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, **settings: Any
) -> CrystalGraph:
    """coGN's graph as published."""
    return structure_graph(lattice, positions, atomic_numbers, COGN | settings)


@functools.cache
def prototypes() -> dict[str, Structure]:
    """Textbook crystals whose neighbour shells are known."""

    def cubic(spacegroup: int, a: float, sites: dict[str, list[float]]) -> Structure:
        return Structure.from_spacegroup(spacegroup, Lattice.cubic(a), list(sites), list(sites.values()))

    return {
        "rocksalt": cubic(225, 5.64, {"Na": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}),
        "fcc": cubic(225, 3.61, {"Cu": [0, 0, 0]}),
        "caesium chloride": cubic(221, 4.12, {"Cs": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}),
        "diamond": cubic(227, 3.57, {"C": [0, 0, 0]}),
        "perovskite": cubic(221, 3.9, {"Sr": [0, 0, 0], "Ti": [0.5, 0.5, 0.5], "O": [0.5, 0.5, 0]}),
        "wurtzite": Structure.from_spacegroup(
            186, Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
        ),
        "quartz": Structure.from_spacegroup(
            154, Lattice.hexagonal(4.916, 5.405), ["Si", "O"], [[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.7858]]
        ),
    }


def crystal_of_spacegroup(spacegroup: int, seed: int) -> Structure:
    """Two or three elements on random or special positions, from a seed; inside a property test."""
    crystal = candidate(spacegroup, seed)
    assume(is_sound(crystal))
    return crystal


@functools.cache
def varied_crystals() -> list[Structure]:
    """One crystal of every eighth space group."""
    found = []
    for spacegroup in range(1, 231, 8):
        tried = (candidate(spacegroup, seed) for seed in itertools.count(spacegroup))
        found.append(next(filter(is_sound, tried)))
    return found


def is_sound(crystal: Structure) -> bool:
    """Whether it is small and no two atoms are close."""
    return len(crystal) <= 60 and (crystal.distance_matrix + 9 * np.eye(len(crystal))).min() > 0.3


def candidate(spacegroup: int, seed: int) -> Structure:
    """A crystal that may be unsound."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(4, 9, 3)
    if spacegroup >= 195:
        lattice = Lattice.cubic(a)
    elif spacegroup >= 143:
        lattice = Lattice.hexagonal(a, c)
    elif spacegroup >= 75:
        lattice = Lattice.tetragonal(a, c)
    elif spacegroup >= 16:
        lattice = Lattice.orthorhombic(a, b, c)
    elif spacegroup >= 3:
        lattice = Lattice.monoclinic(a, b, c, rng.uniform(95, 115))
    else:
        lattice = Lattice.from_parameters(a, b, c, *rng.uniform(75, 105, 3))
    special = np.array([0, 0.25, 0.5])
    mixed = np.where(rng.random(3) < 0.5, rng.choice(special, 3), rng.random(3))
    sites = np.array([rng.choice(special, 3), mixed])
    if spacegroup < 195:
        sites = np.vstack([sites, rng.random(3)])
    else:  # one parameter at most: positions of three have up to 192 atoms
        sites[1] = rng.choice(special) + rng.choice([0, 1], 3) * rng.random()
    species = rng.choice(["Na", "Cl", "Fe", "O", "U"], len(sites), replace=False).tolist()
    return Structure.from_spacegroup(spacegroup, lattice, species, sites)
