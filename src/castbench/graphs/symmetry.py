"""Symmetry operations of a crystal, found in its primitive cell, and the crystal made exactly symmetric.

The steps are spglib's (Togo et al., Sci. Technol. Adv. Mater. Methods 4, 2384822, 2024) up to the operations.
What it does next, placing every atom on a Wyckoff position of the conventional cell, no graph needs, and it
takes up to a hundred times as long. Coordinates are rows: x goes to x @ rotation + translation.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import spglib

CENTRING = {"P": 1, "A": 2, "B": 2, "C": 2, "I": 2, "R": 3, "F": 4}
# The rotations of a reduced lattice have entries -1, 0 and 1: their rows are three of these.
VECTORS = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
PROPER = np.array([[[np.dot(a, np.cross(b, c)) == 1 for c in VECTORS] for b in VECTORS] for a in VECTORS])
BLOCK = 3000  # distances compared at once: few, so that most candidates fail early


class NoSymmetryError(ValueError):
    """What is the same within the tolerance does not make a space group."""


@dataclass(frozen=True)
class SymmetricCell:
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


def symmetric_cell(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> SymmetricCell:
    """The crystal in a reduced primitive cell, averaged over its symmetry operations.

    Raises:
        NoSymmetryError: what is the same within `symprec` (angstrom) does not make a space group.
    """
    lattice, positions, atoms = _primitive_cell(lattice, positions, atomic_numbers, symprec)
    positions = positions - positions.mean(axis=0)
    rotations = _lattice_rotations(lattice, symprec)
    which, shifts, images = _matches(rotations, lattice, positions, atomic_numbers[atoms], symprec)
    rotations = rotations[which]
    # Seen from the centroid, translations are means of integers: exact, however noisy the positions.
    moved = _apply(rotations, positions)
    cells = np.rint(moved + shifts[:, None] - positions[images])
    translations = cells.mean(axis=1)
    _check_group(rotations, translations)
    copies = np.empty_like(moved)
    np.put_along_axis(copies, images[..., None], moved + translations[:, None] - cells, axis=1)
    averaged = copies.mean(axis=0)
    if np.linalg.norm((averaged - positions) @ lattice, axis=1).max() > symprec:
        raise NoSymmetryError("atoms move by more than the tolerance")
    metric = (rotations @ (lattice @ lattice.T) @ rotations.transpose(0, 2, 1)).mean(axis=0)
    lattice = np.linalg.cholesky(metric)
    n = len(atoms)
    spacegroup, centring = _spacegroup(rotations.tobytes(), (np.rint(translations * n) % n).tobytes(), n)
    return SymmetricCell(lattice, averaged, atoms, images.min(axis=0), spacegroup, centring)


@lru_cache(maxsize=10_000)
def _spacegroup(rotations: bytes, translations: bytes, n: int) -> tuple[int, int]:
    """International number and centring of operations, which many crystals share; translations in n-ths."""
    kind = spglib.get_spacegroup_type_from_symmetry(
        np.frombuffer(rotations).reshape(-1, 3, 3).transpose(0, 2, 1),
        np.frombuffer(translations).reshape(-1, 3) / n,
    )
    if kind is None:
        raise NoSymmetryError("no known space group")
    return kind.number, CENTRING[kind.international_short[0]]


def _primitive_cell(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, symprec: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Niggli-reduced primitive lattice, positions averaged over the pure translations, and the atoms kept."""
    n = len(atomic_numbers)
    atoms, primitive = np.arange(n), lattice
    if np.gcd.reduce(np.bincount(atomic_numbers)) > 1:
        _, shifts, images = _matches(np.eye(3)[None], lattice, positions, atomic_numbers, symprec)
        m = len(shifts)
        if m > 1:
            steps = np.rint(shifts * m).astype(int)  # m translations: m times each is a lattice vector
            basis = _integer_basis([*steps.tolist(), [m, 0, 0], [0, m, 0], [0, 0, m]])
            if abs(round(np.linalg.det(basis))) != m**2:
                raise NoSymmetryError("the translations are no lattice")
            offsets = positions[images] - positions - steps[:, None] / m
            positions = positions + (offsets - np.rint(offsets)).mean(axis=0)
            atoms = np.unique(images.min(axis=0))
            primitive = basis @ lattice / m
    # Right-handed, or the crystal would turn into its mirror image.
    reduced = spglib.niggli_reduce(primitive * np.sign(np.linalg.det(primitive)))
    if reduced is None:
        raise NoSymmetryError("the lattice cannot be reduced")
    return reduced, positions[atoms] @ lattice @ np.linalg.inv(reduced), atoms


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Translations that with a rotation (r, 3, 3) move every atom onto one of its element.

    Returns:
        Of each of s operations: which rotation (s,), translation (s, 3), where atoms go (s, n).
    """
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
        raise NoSymmetryError("two atoms in one place")
    return which, shifts, images


def _check_group(rotations: np.ndarray, translations: np.ndarray) -> None:
    """Raise NoSymmetryError unless the product of any two operations is one of them."""
    weights = 3.0 ** np.arange(9)
    keys = rotations.reshape(-1, 9) @ weights
    order = keys.argsort()
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        raise NoSymmetryError("the cell is not primitive")
    products = _apply(rotations, rotations.reshape(-1, 3)).reshape(
        -1, 9
    )  # of operation h after g, in order (h, g)
    found = order[keys.searchsorted(products @ weights).clip(max=len(keys) - 1)]
    if (rotations[found].reshape(-1, 9) != products).any():
        raise NoSymmetryError("the rotations are no group")
    combined = _apply(rotations, translations) + translations[:, None]
    apart = combined.reshape(-1, 3) - translations[found]
    if np.abs(apart - np.rint(apart)).max() > 1e-6:
        raise NoSymmetryError("the translations do not match")
