"""CrystalNN's view of every site of a structure, computed once.

The neighbours of a site, their weights, and the likelihood of each coordination number, as pymatgen's
CrystalNN (Pan et al., Inorg. Chem. 60, 1590, 2021) finds them at its default settings. Robocrystallographer
asks for them three times a site (bonds, mineral, geometry), each time with an object for each atom in reach.

Which of two symmetric neighbours comes first is decided by the last bit of their weights, and some order
parameters depend on it. So every number here is made by the same operations in the same order as in pymatgen:
products of single vectors by `dot`, sums one by one.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pymatgen.core import Structure
from pymatgen.core.local_env import CrystalNN, _get_default_radius, _get_radius
from scipy.spatial import Voronoi

from castbench.text.robocrystallographer.order_parameters import fingerprints, stock_featurizer

CUTOFF = 7.0  # angstrom: atoms that take part in the tessellation at first
NEAR, FAR = 0.5, 1.0  # angstrom beyond the sum of radii: where a bond's weight begins to fall, and is gone
ELECTRONEGATIVITY = 3.0  # how much a difference in electronegativity (at most 3.3) adds to a weight


@dataclass(frozen=True, slots=True)
class Environment:
    """Neighbours of a site, the likeliest first.

    Attributes:
        sites: (n,) index in the structure.
        images: (n, 3) cell, in lattice vectors from the structure's.
        vectors: (n, 3) from the site to the neighbour, angstrom.
        cn_weights: likelihood of each coordination number c, whose neighbours are the first c.
    """

    sites: np.ndarray
    images: np.ndarray
    vectors: np.ndarray
    cn_weights: dict[int, float]

    @property
    def bonded(self) -> int:
        """The likeliest coordination number."""
        return max(self.cn_weights, key=lambda cn: self.cn_weights[cn])


class Environments:
    """All environments of a structure, and their fingerprints when they are asked for."""

    def __init__(self, structure: Structure):
        self.structure = structure
        self.elements = [site.specie for site in structure]
        self.radii = {element: _radii(site) for element, site in zip(self.elements, structure, strict=True)}
        self.sites = [self._environment(site) for site in range(len(structure))]

    @cached_property
    def fingerprints(self) -> np.ndarray:
        """Order parameters (N, F) of the sites."""
        values, on_edge = fingerprints(
            [site.vectors for site in self.sites], [site.cn_weights for site in self.sites]
        )
        for site in on_edge:
            values[site] = stock_featurizer().featurize(self.structure, site)
        return values

    def _environment(self, site: int) -> Environment:
        """CrystalNN.get_nn_data for one site."""
        indices, images, vectors, angles, areas = _faces(self.structure, site)
        weights = angles / angles.max()
        weights *= angles / areas  # less for what is far across a void
        weights *= [self._chemical_weight(site, other) for other in indices.tolist()]
        order = np.argsort(-weights, kind="stable")
        if weights[order[0]] == 0:
            return _isolated()
        weights /= weights[order[0]]
        weights *= [
            self._distance_weight(site, other, vector)
            for other, vector in zip(indices.tolist(), vectors, strict=True)
        ]
        order = order[np.argsort(-weights[order], kind="stable")]
        rounded = np.round(weights[order], 3)
        kept = order[rounded > 0]
        if weights[order[0]] == 0:
            return _isolated()
        return Environment(
            indices[kept], images[kept], vectors[kept], _coordination(rounded[: len(kept)].tolist())
        )

    def _chemical_weight(self, site: int, other: int) -> float:
        """More than 1 for neighbours of another electronegativity."""
        difference = abs(self.elements[site].X - self.elements[other].X)
        return 1 if math.isnan(difference) else 1 + ELECTRONEGATIVITY * math.sqrt(difference / 3.3)

    def _distance_weight(self, site: int, other: int, vector: np.ndarray) -> float:
        """1 for a bond as long as the radii say, falling to 0 for a longer one."""
        (ionic, default), (their_ionic, their_default) = (
            self.radii[self.elements[number]] for number in (site, other)
        )
        length = ionic + their_ionic if ionic > 0 and their_ionic > 0 else default + their_default
        distance, near, far = np.linalg.norm(vector), length + NEAR, length + FAR
        if distance <= near:
            return 1
        return (math.cos((distance - near) / (far - near) * math.pi) + 1) * 0.5 if distance < far else 0


_recent: deque[Environments] = deque(maxlen=2)  # of the structure, and with molecules as points


def environments(structure: Structure) -> Environments:
    """Environments of a structure; asked again for the same object, the same ones."""
    for known in _recent:
        if known.structure is structure:
            return known
    _recent.append(Environments(structure))
    return _recent[-1]


def _radii(site: Any) -> tuple[float, Any]:
    """Ionic radius, 0 where it is not known, and the covalent or atomic one that is taken instead, if any."""
    return _get_radius(site), _get_default_radius(site)


def _isolated() -> Environment:
    return Environment(np.zeros(0, int), np.zeros((0, 3), int), np.zeros((0, 3)), {0: 1.0})


def _coordination(weights: list[float]) -> dict[int, float]:
    """Likelihood of each coordination number from the neighbours' falling weights."""
    bins = [*dict.fromkeys(weights), 0]
    likelihood: dict[int, float] = {}
    for i, weight in enumerate(bins[:-1]):
        count = sum(other >= weight for other in weights)
        likelihood[count] = CrystalNN._semicircle_integral(bins, i)
    rest = 1 - _add(likelihood.values())
    return likelihood | {0: rest} if rest > 0 else likelihood


def _faces(structure: Structure, site: int) -> tuple[np.ndarray, ...]:
    """Faces of a Voronoi cell: neighbour, its image and vector, solid angle (sr), area (angstrom^2)."""
    lattice = structure.lattice
    centre = structure[site].coords
    corners = lattice.get_cartesian_coords([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    limit = np.linalg.norm(corners, axis=1).max() + 0.01
    cutoff = CUTOFF
    while True:
        found: Any = lattice.get_points_in_sphere(structure.frac_coords, centre, cutoff, zip_results=False)
        frac, distances, indices, images = found
        order = np.argsort(distances, kind="stable")
        points = np.array([lattice.get_cartesian_coords(row) for row in frac[order]])
        try:
            cell = Voronoi(points)
            pairs = cell.ridge_points
            rows = np.nonzero((pairs == 0).any(axis=1))[0]
            faces = [cell.ridge_vertices[row] for row in rows]
            if any(-1 in face for face in faces):
                raise RuntimeError(
                    "This structure is pathological, infinite vertex in the Voronoi construction"
                )
            break
        except RuntimeError as error:
            if cutoff >= limit:
                if "vertex" in str(error):
                    raise
                raise RuntimeError("Error in Voronoi neighbor finding; max cutoff exceeded") from error
            cutoff = min(cutoff * 2, limit + 0.001)
    if not faces:
        raise ValueError("No Voronoi neighbors found for site - try increasing cutoff")
    others = pairs[rows].sum(axis=1)  # the centre is number 0
    angles, volumes = _pyramids(points[0], cell.vertices, faces)
    heights = np.array([np.linalg.norm(vector) for vector in points[0] - points[others]]) / 2
    chosen = order[others]
    return indices[chosen], images[chosen].astype(int), points[others] - centre, angles, 3 * volumes / heights


def _pyramids(top: np.ndarray, vertices: np.ndarray, faces: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Solid angles (sr) and volumes (angstrom^3) of the pyramids from a point over the faces.

    A face is cut into triangles (0, 1, 2), (0, 2, 3), ...; all of them are done at once but for the products.
    """
    cuts = [(face[0], face[i], face[i + 1]) for face in faces for i in range(1, len(face) - 1)]
    a, b, c = vertices[np.array(cuts)].transpose(1, 0, 2)
    along_a, along_b, along_c = a - top, b - top, c - top
    length_a, length_b, length_c = (np.sqrt(_dots(v, v)) for v in (along_a, along_b, along_c))
    above = np.abs(_dots(along_a, np.cross(along_b, along_c)))
    below = (
        length_a * length_b * length_c
        + length_c * _dots(along_a, along_b)
        + length_b * _dots(along_a, along_c)
        + length_a * _dots(along_b, along_c)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.arctan(above / below)
    half = np.where(below == 0, np.where(above > 0, 0.5 * math.pi, -0.5 * math.pi), half)
    angle = np.where(half > 0, half, half + math.pi) * 2
    volume = np.abs(_dots(top - c, np.cross(a - c, b - c))) / 6
    stops = np.cumsum([len(face) - 2 for face in faces])[:-1]
    return tuple(  # type: ignore[return-value]
        np.array([_add(part.tolist()) for part in np.split(values, stops)]) for values in (angle, volume)
    )


def _dots(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Scalar products (n,) of rows (n, 3), each with the rounding of `dot`."""
    return np.array([np.dot(x, y) for x, y in zip(first, second, strict=True)])


def _add(values: Iterable[float]) -> float:
    """Sum from left to right (since Python 3.12 `sum` corrects for rounding)."""
    total = 0.0
    for value in values:
        total += value
    return total
