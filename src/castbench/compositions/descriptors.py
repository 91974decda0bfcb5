"""What the EDM Transformer knows of an element (report, sections 4.2 to 4.5), without torch.

Per element 200 numbers of mat2vec (Tshitoyan et al. 2019, as packed by ElementEmbeddings) and ten properties
from pymatgen; per element of a compound 256 numbers that encode its atomic fraction. Together 466: the report
says 768, which is the width after its input projection (spec: 200 + 10 + 256).
"""

from __future__ import annotations

import csv
import math
import warnings
from functools import cache
from importlib.resources import files

import numpy as np
from pymatgen.core import Element

N_ELEMENTS = 118
N_MAT2VEC = 200
PROPERTIES = (
    "atomic number", "atomic mass (u)", "electronegativity (Pauling)", "atomic radius (angstrom)",
    "average ionic radius (angstrom)", "group", "row", "metal", "transition metal", "metalloid",
)  # fmt: skip
NUMERIC = 7  # of the properties; the others are flags
FRACTION_WIDTHS = {"linear": 86, "log": 86, "sqrt": 84}  # even, as equal as they can be, 256 in all
LONGEST, SHORTEST = 4.0, 0.01  # wavelengths of the encoding, in units of the scaled fraction
LOWEST_FRACTION = 1e-4  # the logarithmic scale begins here
N_FEATURES = N_MAT2VEC + len(PROPERTIES) + sum(FRACTION_WIDTHS.values())


@cache
def mat2vec() -> dict[str, np.ndarray]:
    """Symbol -> vector (200,), of the elements that mat2vec knows."""
    # The package itself takes seconds to import; its file is all that is needed.
    file = files("elementembeddings") / "data" / "element_representations" / "mat2vec.csv"
    with file.open(encoding="utf-8") as lines:
        rows = csv.reader(lines)
        next(rows)
        return {row[0]: np.array(row[1:], dtype=np.float32) for row in rows}


@cache
def embedded_elements() -> frozenset[str]:
    """Symbols of the elements that have both a vector and a place in the periodic table."""
    return frozenset(mat2vec()) & {Element.from_Z(z).symbol for z in range(1, N_ELEMENTS + 1)}


def _measured(element: Element) -> list[float]:
    """The ten properties of an element, NaN where pymatgen has none (it says 0 for an ionic radius)."""
    radius, ionic = element.atomic_radius, float(element.average_ionic_radius)
    return [
        float(element.Z),
        float(element.atomic_mass),
        float(element.X),
        math.nan if radius is None else float(radius),
        ionic or math.nan,
        float(element.group),
        float(element.row),
        float(element.is_metal),
        float(element.is_transition_metal),
        float(element.is_metalloid),
    ]


@cache
def element_properties() -> tuple[np.ndarray, np.ndarray]:
    """Properties (118, 10), row Z - 1, without gaps, and a mask (118, 10) of those that were imputed.

    A missing value (electronegativity, atomic radius or ionic radius) is that of the nearest element, by
    atomic number, of the same group; an f element's, that of the nearest one of its row; failing these, the
    mean over all elements that have one.
    """
    elements = [Element.from_Z(z) for z in range(1, N_ELEMENTS + 1)]
    with warnings.catch_warnings():  # pymatgen warns of each element without an electronegativity
        warnings.simplefilter("ignore")
        table = np.array([_measured(element) for element in elements])
    missing = np.isnan(table)
    filled = table.copy()
    for row, column in np.argwhere(missing):
        element = elements[row]
        f_block = element.is_lanthanoid or element.is_actinoid
        kin = [
            other
            for other, e in enumerate(elements)
            if not missing[other, column]
            and (
                e.row == element.row and (e.is_lanthanoid or e.is_actinoid)
                if f_block
                else e.group == element.group and not (e.is_lanthanoid or e.is_actinoid)
            )
        ]
        nearest = min(kin, key=lambda other: abs(other - row), default=None)
        filled[row, column] = np.nanmean(table[:, column]) if nearest is None else table[nearest, column]
    return filled, missing


@cache
def element_table() -> np.ndarray:
    """Features (119, 210) float32 by atomic number: mat2vec, then the properties; row 0 (padding) is 0.

    Every number is standardised over the elements that have it (mat2vec's raw components are so small that
    the fractions drown them), flags are 0 or 1. An element without an embedding is NaN, so that it can never
    pass for one.
    """
    absent = np.full(N_MAT2VEC, np.nan, dtype=np.float32)
    symbols = [Element.from_Z(z).symbol for z in range(1, N_ELEMENTS + 1)]
    vectors = np.stack([mat2vec().get(symbol, absent) for symbol in symbols])
    properties = element_properties()[0]
    numbers = np.concatenate([vectors, properties[:, :NUMERIC]], axis=1)
    numbers = (numbers - np.nanmean(numbers, axis=0)) / np.nanstd(numbers, axis=0)
    table = np.zeros((N_ELEMENTS + 1, N_MAT2VEC + len(PROPERTIES)), dtype=np.float32)
    table[1:] = np.concatenate([numbers, properties[:, NUMERIC:]], axis=1)
    return table


def scaled_fractions(fractions: np.ndarray) -> dict[str, np.ndarray]:
    """Fractions in [0, 1] on the three scales of section 4.4, each again in [0, 1]."""
    clipped = np.maximum(fractions, LOWEST_FRACTION)
    return {
        "linear": fractions,
        "log": 1 - np.log(clipped) / math.log(LOWEST_FRACTION),
        "sqrt": np.sqrt(fractions),
    }


def frequencies(width: int) -> np.ndarray:
    """Angular frequencies (width / 2,) float32, in geometric steps between the two wavelengths."""
    return (2 * math.pi / np.geomspace(LONGEST, SHORTEST, width // 2)).astype(np.float32)


def encode_fractions(fractions: np.ndarray) -> np.ndarray:
    """Sinusoids (..., 256) float32 of atomic fractions (...), 0 where the fraction is 0 (padding)."""
    parts = []
    for scale, scaled in scaled_fractions(np.asarray(fractions, dtype=np.float32)).items():
        angles = scaled[..., None] * frequencies(FRACTION_WIDTHS[scale])
        parts += [np.sin(angles), np.cos(angles)]
    encoded = np.concatenate(parts, axis=-1).astype(np.float32)
    return np.where(np.asarray(fractions)[..., None] > 0, encoded, np.float32(0))


def descriptor_matrix(numbers: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Element descriptor matrices (n, slots, 466) float32 of packed compositions, 0 at padding."""
    return np.concatenate([element_table()[numbers], encode_fractions(fractions)], axis=-1)
