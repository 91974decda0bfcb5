"""Facts about the 118 elements as node features of coGN.

The reference's table comes from PubChem; this one from pymatgen's periodic table: mass, van der Waals radius
(which PubChem lists too), Pauling electronegativity, first ionisation energy, common oxidation states. The
reference's values stand for the gaps.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
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
