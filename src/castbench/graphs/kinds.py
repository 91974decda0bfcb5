"""Which graph each structure encoder reads, as published, on the asymmetric unit.

An atom's state follows from what surrounds it, so the atoms of an orbit have one state, and only one of them
needs edges into it. The mean over the whole cell is the mean over nodes weighted by their multiplicity.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from castbench.graphs.asymmetric import AsymmetricUnit
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.neighbours import nearest_graph, radius_graph, unit_of
from castbench.graphs.reciprocal import reciprocal_graph
from castbench.graphs.voronoi import voronoi_graph

MEGNET_RADIUS = 4.0  # angstrom (Chen et al., Chem. Mater. 31, 3564, 2019)


@dataclass(frozen=True)
class Kind:
    """A graph of an asymmetric unit and settings, and the arrays that it has beyond those of every graph."""

    build: Callable[[AsymmetricUnit, dict[str, Any]], CrystalGraph]
    arrays: tuple[str, ...] = ()


NEAREST = Kind(lambda unit, of: nearest_graph(unit, of["neighbours"], of["symprec"]))
KINDS = {
    "cogn": NEAREST,
    "congn": Kind(lambda unit, of: voronoi_graph(unit, of["symprec"]), ("vectors", "ridge_areas")),
    "alignn": Kind(
        lambda unit, of: reciprocal_graph(unit, of["neighbours"], of["symprec"]), ("vectors", "edge_reverse")
    ),
    "cgcnn": NEAREST,  # whose reference cuts the last shell where its list happens to end
    "megnet": Kind(lambda unit, of: radius_graph(unit, MEGNET_RADIUS, of["symprec"])),
}


def structure_graph(
    lattice: np.ndarray, positions: np.ndarray, atomic_numbers: np.ndarray, settings: dict[str, Any]
) -> CrystalGraph:
    """The graph of a crystal that an encoder reads.

    Args:
        lattice: (3, 3) row vectors, angstrom.
        positions: (n, 3) fractional coordinates.
        atomic_numbers: (n,) elements.
        settings: "structure_encoder"; "symprec" (angstrom); "neighbours" of a node where it has that number.

    Raises:
        ValueError: the crystal is none.
    """
    encoder = settings["structure_encoder"]
    unit = unit_of(lattice, positions, atomic_numbers, settings["symprec"])
    graph = KINDS[encoder].build(unit, settings)
    if encoder == "cogn":
        return graph
    # Of the primitive cell: batch normalisation counts atoms, and the references are given that cell.
    return replace(graph, multiplicities=graph.multiplicities / np.float32(unit.centring))
