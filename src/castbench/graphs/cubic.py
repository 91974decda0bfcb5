"""Symmetry of cubic crystals without spglib, which takes 25 ms for a face-centred one and 2 ms for others.

The steps are spglib's (Togo et al., Sci. Technol. Adv. Mater. Methods 4, 2384822, 2024) up to the operations.
Then it places every atom of the conventional cell on a Wyckoff position: most of the work where there are 192
operations, and not needed for a graph. The crystal is spglib's to 1e-6 angstrom; where that is not certain it
is refused.

Coordinates are rows: an operation takes x to x @ rotation + translation.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import spglib

CENTRING = {"P": 1, "I": 2, "F": 4}
# The rotations of a reduced lattice have entries -1, 0 and 1: their rows are three of these.
VECTORS = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
PROPER = np.array([[[np.dot(a, np.cross(b, c)) == 1 for c in VECTORS] for b in VECTORS] for a in VECTORS])
EXACT = (
    1e-6  # equivalent atoms may be off by this, angstrom: then it matters little which of them is believed
)
BLOCK = 3000  # distances compared at once: few, so that most candidates fail early


class NotCubicError(ValueError):
    """The crystal is not cubic, or not beyond doubt."""


@dataclass(frozen=True)
class CubicCell:
    """A primitive cell of n atoms that is exactly symmetric.

    Attributes:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        atoms: (n,) an atom of the input that each one is.
        orbits: (n,) first atom of its orbit in this cell.
        spacegroup: international number.
        centring: primitive cells in the conventional one.
    """

    lattice: np.ndarray
    positions: np.ndarray
    atoms: np.ndarray
    orbits: np.ndarray
    spacegroup: int
    centring: int


def cubic_cell(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> CubicCell:
    """A cubic crystal in its reduced primitive cell, averaged over its symmetry operations.

    Args:
        lattice: (3, 3) row vectors, angstrom, of any cell that is cubic itself or primitive.
        positions: (n, 3) fractional coordinates.
        atomic_numbers: (n,) elements.
        symprec: distance tolerance of the symmetry search, angstrom.

    Raises:
        NotCubicError: it is not cubic, or some operation holds within 2 `symprec` but not within EXACT.
    """
    if np.ptp(np.linalg.norm(_reduced(lattice), axis=1)) > symprec:
        raise NotCubicError("edges of different lengths")
    lattice, positions, atoms = _primitive_cell(lattice, positions, atomic_numbers, symprec)
    rotations = _lattice_rotations(lattice, symprec / 2)
    if len(rotations) < 48:
        raise NotCubicError("not a cubic lattice")
    which, translations, images, copies = _matches(
        rotations, lattice, positions, atomic_numbers[atoms], 2 * symprec
    )
    rotations = rotations[which]
    _check_group(rotations, translations)
    n = len(atoms)
    spacegroup, centring = _spacegroup(rotations.tobytes(), (np.rint(translations * n) % n).tobytes(), n)
    metric = (rotations @ (lattice @ lattice.T) @ rotations.transpose(0, 2, 1)).mean(axis=0)
    positions = _average(copies, images, lattice)
    return CubicCell(np.linalg.cholesky(metric), positions, atoms, images.min(axis=0), spacegroup, centring)


@lru_cache(maxsize=10_000)
def _spacegroup(rotations: bytes, translations: bytes, n: int) -> tuple[int, int]:
    """Number and centring of the group of operations, which many crystals share; translations in n-ths."""
    kind = spglib.get_spacegroup_type_from_symmetry(
        np.frombuffer(rotations).reshape(-1, 3, 3).transpose(0, 2, 1),
        np.frombuffer(translations).reshape(-1, 3) / n,
    )
    if kind is None or kind.number < 195:
        raise NotCubicError("not a cubic space group")
    return kind.number, CENTRING[kind.international_short[0]]


def _primitive_cell(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Niggli-reduced primitive lattice, positions averaged over the pure translations, and the atoms kept."""
    atoms, primitive = np.arange(len(atomic_numbers)), lattice
    if np.gcd.reduce(np.bincount(atomic_numbers)) > 1:
        identity = np.eye(3)[None]
        _, shifts, images, copies = _matches(identity, lattice, positions, atomic_numbers, 2 * symprec)
        m = len(shifts)
        if m > 1:
            steps = np.rint(shifts * m).astype(int)  # m translations: m times each is a lattice vector
            basis = _integer_basis([*steps.tolist(), [m, 0, 0], [0, m, 0], [0, 0, m]])
            if abs(round(np.linalg.det(basis))) != m**2:
                raise NotCubicError("the translations are no lattice")
            positions = _average(copies, images, lattice)
            atoms = np.unique(images.min(axis=0))
            primitive = basis @ lattice / m
    # Right-handed, or the crystal would turn into its mirror image.
    reduced = _reduced(primitive * np.sign(np.linalg.det(primitive)))
    return reduced, positions[atoms] @ lattice @ np.linalg.inv(reduced), atoms


def _reduced(lattice: np.ndarray) -> np.ndarray:
    reduced = spglib.niggli_reduce(lattice)
    if reduced is None:
        raise NotCubicError("a lattice that cannot be reduced")
    return reduced


def _integer_basis(rows: list[list[int]]) -> np.ndarray:
    """Basis (3, 3) of the lattice that integer vectors span, upper triangular."""
    basis = []
    for column in range(3):
        while True:
            rows.sort(key=lambda row: (row[column] == 0, abs(row[column])))
            pivot = rows[0]
            if all(row[column] == 0 for row in rows[1:]):
                break
            rows = [pivot] + [
                [x - row[column] // pivot[column] * y for x, y in zip(row, pivot, strict=True)]
                for row in rows[1:]
            ]
        basis.append(pivot)
        rows = rows[1:]
    return np.array(basis)


def _lattice_rotations(lattice: np.ndarray, symprec: float) -> np.ndarray:
    """Rotations (r, 3, 3), improper ones too, that keep a reduced lattice the same within `symprec`."""
    metric = lattice @ lattice.T
    products = VECTORS @ metric @ VECTORS.T
    lengths, old = np.sqrt(products.diagonal()), np.sqrt(metric.diagonal())
    fitting = [np.flatnonzero(near) for near in np.abs(lengths - old[:, None]) < symprec]
    rows = np.column_stack([v[i] for v, i in zip(fitting, PROPER[np.ix_(*fitting)].nonzero(), strict=True)])
    i, j = (0, 0, 1), (1, 2, 2)
    sheared = np.abs(products[rows[:, i], rows[:, j]] - metric[i, j])
    rows = rows[(sheared < symprec * np.sqrt(metric[i, i] * metric[j, j]) ** 0.5).all(axis=1)]
    rotations = VECTORS[rows]
    return np.concatenate([rotations, -rotations])


def _apply(rotations: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (n, 3) by each rotation (r, 3, 3) as one matrix product, (r, n, 3)."""
    product = rows @ rotations.transpose(1, 0, 2).reshape(3, -1)
    return product.reshape(len(rows), -1, 3).transpose(1, 0, 2)


def _matches(
    rotations: np.ndarray,
    lattice: np.ndarray,
    positions: np.ndarray,
    atomic_numbers: np.ndarray,
    symprec: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Translations that with a rotation (r, 3, 3) move every atom onto one of its element.

    Returns:
        Of each of s operations: which rotation (s,), its translation if the centroid is the origin (s, 3),
        the atom that each atom goes to (s, n), and where it arrives, seen from the centroid (s, n, 3).
    """
    positions = positions - positions.mean(axis=0)
    groups = sorted((np.flatnonzero(atomic_numbers == z) for z in set(atomic_numbers.tolist())), key=len)
    rarest = groups[0]
    moved = _apply(rotations, positions)
    which = np.repeat(np.arange(len(rotations)), len(rarest))
    shifts = (positions[rarest] - moved[:, rarest[:1]]).reshape(-1, 3)
    images = np.empty((len(which), len(atomic_numbers)), dtype=int)
    for group in groups:
        left = group
        while len(left):
            size = max(1, BLOCK // (len(which) * len(group)))
            block, left = left[:size], left[size:]
            apart = (moved[which[:, None], block] + shifts[:, None])[:, :, None] - positions[group]
            vectors = (apart - np.rint(apart)).reshape(-1, 3) @ lattice
            squared = (vectors * vectors).sum(axis=1).reshape(apart.shape[:3])
            images[:, block] = group[squared.argmin(axis=2)]
            same = (squared.min(axis=2) < symprec**2).all(axis=1)
            which, shifts, images = which[same], shifts[same], images[same]
    if not (np.sort(images, axis=1) == np.arange(len(atomic_numbers))).all():
        raise NotCubicError("two atoms in one place")
    # The best translations are means of integers, hence exact.
    cells = np.rint(moved[which] + shifts[:, None] - positions[images])
    translations = cells.mean(axis=1)
    copies = moved[which] + translations[:, None] - cells
    return which, translations, images, copies


def _average(copies: np.ndarray, images: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Mean position (n, 3) of what arrives at each atom; NotCubicError if it is off by more than EXACT."""
    arrived = np.empty_like(copies)
    np.put_along_axis(arrived, images[..., None], copies, axis=1)
    mean = arrived.mean(axis=0)
    if np.abs((arrived - mean) @ lattice).max() > EXACT:
        raise NotCubicError("noisy positions")
    return mean


def _check_group(rotations: np.ndarray, translations: np.ndarray) -> None:
    """Raise NotCubicError unless the product of any two operations is one of them."""
    weights = 3.0 ** np.arange(9)
    keys = rotations.reshape(-1, 9) @ weights
    order = keys.argsort()
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        raise NotCubicError("the cell is not primitive")
    products = _apply(rotations, rotations.reshape(-1, 3)).reshape(-1, 9)  # operation h after g at (h, g)
    found = order[keys.searchsorted(products @ weights).clip(max=len(keys) - 1)]
    if (rotations[found].reshape(-1, 9) != products).any():
        raise NotCubicError("the rotations are no group")
    combined = _apply(rotations, translations) + translations[:, None]
    apart = combined.reshape(-1, 3) - translations[found]
    if np.abs(apart - np.rint(apart)).max() > 1e-6:
        raise NotCubicError("the translations do not match")
