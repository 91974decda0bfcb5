#!/usr/bin/env python3
"""Elemental references and crystals that are not cubic, in the settings of label_crystals.py.

The shape of a cell (axis ratios, internal coordinates) is the experimental one; an isotropic equation of state gives its
size.  Gases and molecular solids are molecules in a box at the bond length of the PBE molecule (oxygen spin-polarised,
a triplet).  The elements whose reference is cubic come from label_crystals.py (bcc, fcc and diamond).

    label_references.py --out references.jsonl [--only Mg O ...]
"""
import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.geometry import cellpar_to_cell
from gpaw import MixerSum, __version__ as gpaw_version

from label_crystals import append_row, calculator, label_shape, rows


def hexagonal(symbols, frac, a, c):
    return Atoms(symbols, scaled_positions=frac, cell=cellpar_to_cell([a, a, c, 90, 90, 120]), pbc=True)


def hcp(symbol, a, ratio):
    return hexagonal(symbol * 2, [(1 / 3, 2 / 3, .25), (2 / 3, 1 / 3, .75)], a, a * ratio)


def a7(symbol, a, angle, u):
    return Atoms(symbol * 2, scaled_positions=[(u, u, u), (-u, -u, -u)], cell=cellpar_to_cell([a, a, a, angle, angle, angle]), pbc=True)


def chain(symbol, a, c, u):
    return hexagonal(symbol * 3, [(u, 0, 1 / 3), (0, u, 2 / 3), (-u, -u, 0)], a, c)


def base_centred(symbol, a, b, c, y, z):
    """Cmce, site 8f, in the primitive cell of four atoms."""
    cell = np.array([[a / 2, b / 2, 0], [-a / 2, b / 2, 0], [0, 0, c]])
    sites = np.array([(0, y, z), (0, .5 - y, z + .5), (0, y + .5, .5 - z), (0, -y, -z)])
    return Atoms(symbol * 4, positions=sites * [a, b, c], cell=cell, pbc=True)


def wurtzite(metal, anion, a, c, u):
    return hexagonal([metal, metal, anion, anion], [(1 / 3, 2 / 3, 0), (2 / 3, 1 / 3, .5), (1 / 3, 2 / 3, u), (2 / 3, 1 / 3, u + .5)], a, c)


def rutile(metal, anion, a, c, u):
    frac = [(0, 0, 0), (.5, .5, .5), (u, u, 0), (-u, -u, 0), (.5 + u, .5 - u, .5), (.5 - u, .5 + u, .5)]
    return Atoms([metal] * 2 + [anion] * 4, scaled_positions=frac, cell=[a, a, c], pbc=True)


def cadmium_iodide(metal, anion, a, c, u):
    return hexagonal([metal, anion, anion], [(0, 0, 0), (1 / 3, 2 / 3, u), (2 / 3, 1 / 3, -u)], a, c)


# name: (prototype, cell at a volume close to the minimum)
CRYSTALS = {
    **{e: ("hcp", hcp(e, a, ratio)) for e, a, ratio in (
        ("Be", 2.27, 1.568), ("Mg", 3.20, 1.624), ("Ti", 2.95, 1.588), ("Zr", 3.235, 1.593), ("Hf", 3.20, 1.581), ("Sc", 3.32, 1.594), ("Y", 3.65, 1.571),
        ("Zn", 2.67, 1.856), ("Cd", 3.03, 1.886), ("Co", 2.49, 1.623), ("Ru", 2.72, 1.582), ("Os", 2.755, 1.580), ("Tl", 3.52, 1.598))},
    **{e: ("A7", a7(e, a, angle, u)) for e, a, angle, u in (("As", 4.19, 54.13, .227), ("Sb", 4.58, 57.11, .2335), ("Bi", 4.83, 57.24, .2339))},
    **{e: ("trigonal chain", chain(e, a, c, u)) for e, a, c, u in (("Se", 4.44, 5.04, .2254), ("Te", 4.51, 6.0, .2633))},
    "C": ("graphite", hexagonal("C4", [(0, 0, .25), (0, 0, .75), (1 / 3, 2 / 3, .25), (2 / 3, 1 / 3, .75)], 2.467, 6.72)),
    "Ga": ("alpha-Ga", base_centred("Ga", 4.56, 7.74, 4.57, .1549, .0810)),
    "P": ("black phosphorus", base_centred("P", 3.34, 10.56, 4.41, .1017, .0806)),
    "In": ("bct", Atoms("In", cell=np.array([[-.5, .5, .76], [.5, -.5, .76], [.5, .5, -.76]]) * 3.31, pbc=True)),
    "Li3N": ("Li3N", hexagonal("Li3N", [(0, 0, .5), (1 / 3, 2 / 3, 0), (2 / 3, 1 / 3, 0), (0, 0, 0)], 3.65, 3.88)),
    "BN": ("hexagonal BN", hexagonal("B2N2", [(1 / 3, 2 / 3, .25), (2 / 3, 1 / 3, .75), (2 / 3, 1 / 3, .25), (1 / 3, 2 / 3, .75)], 2.51, 6.68)),
    **{m + x: ("wurtzite", wurtzite(m, x, a, c, u)) for m, x, a, c, u in (
        ("Al", "N", 3.13, 5.01, .382), ("Ga", "N", 3.22, 5.24, .377), ("Be", "O", 2.71, 4.40, .378), ("Si", "C", 3.09, 5.07, .376), ("Zn", "O", 3.28, 5.29, .382),
        ("Zn", "S", 3.85, 6.30, .375), ("Al", "P", 3.89, 6.38, .375), ("Ga", "P", 3.88, 6.40, .374), ("Ga", "As", 4.06, 6.68, .374), ("Al", "As", 4.04, 6.64, .375),
        ("Be", "S", 3.45, 5.66, .375), ("Li", "Cl", 3.85, 6.2, .38))},
    **{m + x + "2": ("rutile", rutile(m, x, a, c, u)) for m, x, a, c, u in (
        ("Si", "O", 4.23, 2.70, .306), ("Ge", "O", 4.51, 2.93, .306), ("Mg", "F", 4.70, 3.09, .303), ("Ti", "O", 4.65, 2.97, .305))},
    **{m + x + "2": ("cadmium iodide", cadmium_iodide(m, x, a, c, u)) for m, x, a, c, u in (
        ("Mg", "Br", 3.86, 6.3, .25), ("Mg", "I", 4.20, 6.95, .25), ("Ca", "I", 4.53, 7.04, .25), ("Be", "Cl", 3.5, 5.8, .25))},
}

# element: bond length (angstrom) of the molecule
DIMERS = {"N": 1.102, "O": 1.218, "F": 1.413, "Cl": 2.01, "Br": 2.31, "I": 2.68}
MARGIN = 7.0    # empty space between images (angstrom)


def dimer(symbol):
    d = DIMERS[symbol]
    return Atoms(symbol * 2, positions=[(0, 0, 0), (0, 0, d)], cell=[MARGIN, MARGIN, MARGIN + d], pbc=True)


def sulfur_ring(bond=2.07, angle=108.3):
    """The crown S8 of the alpha solid."""
    radius = bond * np.sin(np.radians(angle / 2)) / np.sin(np.pi / 4)
    height = (bond ** 2 / 4 - (radius * np.sin(np.pi / 8)) ** 2) ** .5
    phi = np.arange(8) * np.pi / 4
    positions = np.stack([radius * np.cos(phi), radius * np.sin(phi), height * (-1) ** np.arange(8)], axis=1)
    return Atoms("S8", positions=positions, cell=np.ptp(positions, axis=0) + MARGIN, pbc=True)


def label_molecule(atoms, spin):
    extra = {}
    if spin:
        atoms.set_initial_magnetic_moments([1.0] * len(atoms))
        extra = dict(spinpol=True, mixer=MixerSum(.25, 5, 1.0))
    atoms.center()
    atoms.calc = calculator([1, 1, 1], **extra)
    energy = float(atoms.get_potential_energy())
    return dict(formula=atoms.get_chemical_formula("metal"), molecule=True, lattice=atoms.cell.tolist(), species=atoms.get_chemical_symbols(),
                frac_coords=atoms.get_scaled_positions().tolist(), n_atoms=len(atoms), energy=energy, energy_per_atom=energy / len(atoms),
                magnetic_moment=float(atoms.get_magnetic_moment()) if spin else 0., kpts=[1, 1, 1], gpaw=gpaw_version)


def label_reference(name):
    if name in DIMERS or name == "S":
        return dict(prototype="molecule") | label_molecule(sulfur_ring() if name == "S" else dimer(name), spin=name == "O")
    prototype, guess = CRYSTALS[name]

    def cell(volume):
        atoms = guess.copy()
        atoms.set_cell(guess.cell * (volume / guess.get_volume()) ** (1 / 3), scale_atoms=True)
        return atoms
    return dict(prototype=prototype) | label_shape(cell, guess.get_volume())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=int, default=3600)
    names = [*DIMERS, "S", *CRYSTALS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    done = [row["reference"] for row in rows(args.out)]
    for name in args.only:
        if name not in done:
            append_row(args.out, dict(reference=name), args.limit_s, lambda: label_reference(name))


if __name__ == "__main__":
    main()
