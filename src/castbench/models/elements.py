"""Facts about the 118 elements as node features: numbers for coGN, categories for CGCNN and ALIGNN.

coGN's own table comes from PubChem; this one from pymatgen's periodic table: mass, van der Waals radius
(which PubChem lists too), Pauling electronegativity, first ionisation energy, common oxidation states. The
reference's values stand for the gaps.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from contextlib import suppress

import numpy as np
from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
from pymatgen.core import Element

N_ELEMENTS = 118
N_OXIDATION_BITS = 14
LAST_IONISED = 108  # pymatgen's ionisation energies of Mt and Ds are placeholders (50 and 65 eV)
# What stands for a missing value before standardisation (coGN reference; pm, Pauling scale, eV).
MISSING_RADIUS, MISSING_ELECTRONEGATIVITY, MISSING_IONISATION_ENERGY = 209.46, 1.18, 8.0


def _numbers(element: Element) -> tuple[float, float, float, float]:
    """Mass (u), radius (pm), electronegativity (Pauling), ionisation energy (eV)."""
    radius, energies = element.van_der_waals_radius, element.ionization_energies
    measured = energies and element.Z <= LAST_IONISED
    return (
        float(element.atomic_mass),
        MISSING_RADIUS if radius is None else 100 * float(radius),
        MISSING_ELECTRONEGATIVITY if math.isnan(element.X) else element.X,
        float(energies[0]) if measured else MISSING_IONISATION_ENERGY,
    )


def element_facts() -> np.ndarray:
    """Features (118, 18) float32, row Z - 1: four numbers, standardised over the elements, 14 oxidation bits.

    The bit of oxidation state x is (x + 7) mod 14, as in the reference.
    """
    elements = [Element.from_Z(z) for z in range(1, N_ELEMENTS + 1)]
    with warnings.catch_warnings():  # pymatgen warns of each element without an electronegativity
        warnings.simplefilter("ignore")
        numbers = np.array([_numbers(element) for element in elements])
    bits = np.zeros((N_ELEMENTS, N_OXIDATION_BITS))
    for row, element in enumerate(elements):
        bits[row, [(int(state) + 7) % N_OXIDATION_BITS for state in element.common_oxidation_states]] = 1
    standardised = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0, ddof=1)
    return np.concatenate([standardised, bits], axis=1).astype(np.float32)


# Ranges of CGCNN's categories (Xie and Grossman 2018, supplement, Table II), ten each.
RANGES = {
    "electronegativity": (0.5, 4.0),  # Pauling
    "covalent radius": (25.0, 250.0),  # pm
    "ionisation energy": (1.3, 3.3),  # log of eV
    "electron affinity": (-3.0, 3.7),  # eV
    "atomic volume": (1.5, 4.3),  # log of cubic centimetres a mole
}
N_RANGE, N_GROUPS, N_PERIODS, N_VALENCE, BLOCKS = 10, 18, 8, 12, "spdf"
NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)  # which end a period


def _measured(element: Element) -> dict[str, float | None]:
    """The values of `RANGES`; None where pymatgen has none."""
    first, affinity, volume = element.ionization_energies, None, element.molar_volume
    with suppress(KeyError):
        affinity = element.electron_affinity
    radius = CovalentRadius.radius.get(element.symbol)
    return {
        "electronegativity": None if math.isnan(element.X) else element.X,
        "covalent radius": radius and 100 * radius,
        "ionisation energy": math.log(first[0]) if first and element.Z <= LAST_IONISED else None,
        "electron affinity": None if affinity is None or math.isnan(affinity) else affinity,
        "atomic volume": math.log(volume) if volume else None,
    }


def _valence(element: Element) -> int:
    """Electrons outside the noble gas core and filled d and f shells, at most 12."""
    if element.symbol == "He":
        return 2
    if element.block == "f":
        core = NOBLE_GASES[bisect_left(NOBLE_GASES, element.Z) - 1]
        return min(element.Z - core, N_VALENCE)
    return element.group - 10 * (element.group > N_VALENCE)


def element_categories() -> np.ndarray:
    """Features (118, 92) float32, row Z - 1: CGCNN's, a one for the category of each of nine properties.

    Group, period, five ranges of ten, valence electrons (1 to 12, without a filled d shell) and block; a
    value beyond a range is in its last category, and a missing one in none. These are the same for some
    neighbouring lanthanides, so Z / 118 stands in the column of the eighth period, which no element has.
    """
    sizes = (N_GROUPS, N_PERIODS, *[N_RANGE] * len(RANGES), N_VALENCE, len(BLOCKS))
    starts = np.cumsum((0, *sizes))
    rows = np.zeros((N_ELEMENTS, starts[-1]))
    with warnings.catch_warnings():  # pymatgen warns of each value that it lacks
        warnings.simplefilter("ignore")
        for row, element in zip(rows, (Element.from_Z(z) for z in range(1, N_ELEMENTS + 1)), strict=True):
            places: list[int | None] = [element.group - 1, bisect_left(NOBLE_GASES, element.Z)]
            for value, (low, high) in zip(_measured(element).values(), RANGES.values(), strict=True):
                share = None if value is None else (value - low) / (high - low)
                places.append(None if share is None else min(max(int(share * N_RANGE), 0), N_RANGE - 1))
            block = "s" if element.symbol == "He" else element.block  # pymatgen goes by the group
            places += [_valence(element) - 1, BLOCKS.index(block)]
            for start, place in zip(starts[:-1], places, strict=True):
                if place is not None:
                    row[start + place] = 1
            row[N_GROUPS + N_PERIODS - 1] = element.Z / N_ELEMENTS
    return rows.astype(np.float32)
