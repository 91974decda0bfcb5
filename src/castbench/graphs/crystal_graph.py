"""One crystal as a graph: what encoders read and the cache packs."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CrystalGraph:
    """Asymmetric-unit graph of n nodes and e edges, from a neighbour (source) to a centre (target).

    Attributes:
        atomic_numbers: (n,) uint8.
        multiplicities: (n,) float32, atoms that a node stands for: of the conventional cell for coGN, of the
            primitive cell for the other encoders.
        edge_source, edge_target: (e,) int32, sorted by target, then source, then distance.
        distances: (e,) float32, angstrom.
        edge_multiplicities: (e,) float32, parallel edges that an edge stands for.
        spacegroup: international number; packed graphs keep it in their index alone.
        vectors: (e, 3) float32, from the centre to the neighbour, angstrom; where the encoder reads angles.
        edge_reverse: (e,) int32, ALIGNN's: the edge between the same atoms whose centre is the neighbour.
        ridge_areas: (e,) float32, coNGN's: area of the face between the two atoms, square angstrom.
    """

    atomic_numbers: np.ndarray
    multiplicities: np.ndarray
    edge_source: np.ndarray
    edge_target: np.ndarray
    distances: np.ndarray
    edge_multiplicities: np.ndarray
    spacegroup: int | None = None
    vectors: np.ndarray | None = None
    edge_reverse: np.ndarray | None = None
    ridge_areas: np.ndarray | None = None
