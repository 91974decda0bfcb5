"""coNGN's graph: atoms whose Voronoi cells share a face (Ruff et al., Digital Discovery 3, 594, 2024)."""

from dataclasses import replace

import numpy as np
from scipy.spatial import Voronoi

from castbench.graphs.asymmetric import AsymmetricUnit
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.neighbours import Pairs, directed, pairs_with_nearest, pairs_within

MIN_AREA = 1e-6  # square angstrom; smaller faces are corners that rounding has opened (the reference's value)
FLAT = 1e-3  # angstrom; neighbours nearer to a plane than this make no cell
NEAREST = 40  # neighbours whose distance is the first guess of how far a cell reaches, twice


def voronoi_graph(unit: AsymmetricUnit, symprec: float) -> CrystalGraph:
    """One edge for each face of the Voronoi cells of the asymmetric unit, with its area.

    The cell of an atom is certain once no corner is further away than half the radius of the neighbours
    that it was made of; the radius grows until that is so. (The reference takes the 26 cells around the given
    one, which is too little where a cell is thin.)

    Args:
        unit: of the crystal.
        symprec: distance tolerance of the symmetry search, angstrom.

    Raises:
        ValueError: two atoms are closer than `symprec`.
    """
    lattice, positions, centres = unit.lattice, unit.positions, unit.representatives
    _, reach = pairs_with_nearest(lattice, positions, centres, NEAREST)
    chosen, areas = [], []
    for row, (centre, radius) in enumerate(zip(centres, reach, strict=True)):
        pairs, area = _faces(lattice, positions, centre, radius)
        chosen.append(replace(pairs, centre=np.full(len(area), row)))
        areas.append(area)
    pairs = Pairs(
        *(np.concatenate([getattr(part, name) for part in chosen]) for name in Pairs.__annotations__)
    )
    graph, order = directed(unit, pairs, symprec)
    return replace(graph, ridge_areas=np.concatenate(areas)[order].astype(np.float32))


def _faces(
    lattice: np.ndarray, positions: np.ndarray, centre: int, radius: float
) -> tuple[Pairs, np.ndarray]:
    """Neighbours of an atom across the faces of its Voronoi cell, and the areas of these."""
    while True:
        pairs = pairs_within(lattice, positions, np.array([centre]), radius)
        vectors = (positions[pairs.atom] + pairs.image - positions[centre]) @ lattice
        if np.linalg.matrix_rank(vectors, tol=FLAT) == 3:  # not yet, where a layer is far from the next
            cells = Voronoi(np.vstack([np.zeros(3), vectors]))
            corners = cells.regions[cells.point_region[0]]
            if -1 not in corners and np.linalg.norm(cells.vertices[corners], axis=1).max() <= radius / 2:
                break
        radius *= 1.5
    faces = np.flatnonzero((cells.ridge_points == 0).any(axis=1))
    areas = np.array([_area(cells.vertices[cells.ridge_vertices[face]]) for face in faces])
    faces, areas = faces[areas > MIN_AREA], areas[areas > MIN_AREA]
    return pairs[cells.ridge_points[faces].max(axis=1) - 1], areas


def _area(corners: np.ndarray) -> float:
    """Area of a plane convex polygon with corners (c, 3) in order around it, as Qhull lists them."""
    return float(np.linalg.norm(np.cross(corners, np.roll(corners, -1, axis=0)).sum(axis=0)) / 2)
