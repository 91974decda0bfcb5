"""The same graphs as the reference's, recorded by tests/reference/make_cogn_graphs.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from pymatgen.core import Element

from castbench.graphs.crystal_graph import CrystalGraph
from crystals import cogn_graph

LONE = "a cluster and a lone atom"
RECORDED = Path(__file__).parents[2] / "reference" / "cogn_graphs.jsonl.zst"
with zstandard.open(RECORDED, "rt") as lines:
    CRYSTALS = {row["material_id"]: row for row in map(json.loads, lines)}


def graph_of(row: dict) -> CrystalGraph:
    numbers = np.array([Element(symbol).Z for symbol in row["species"]])
    return cogn_graph(np.array(row["lattice"]), np.array(row["frac_coords"]), numbers)


def multigraph(elements_and_distances: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sorted rows, each as often as it counts."""
    rows = elements_and_distances.repeat(counts.astype(int), axis=0)
    return rows[np.lexsort((rows[:, 4], *rows[:, :4].T))]


def edges_of(graph: CrystalGraph) -> np.ndarray:
    nodes = np.column_stack([graph.atomic_numbers, graph.multiplicities])
    edges = np.column_stack([nodes[graph.edge_source], nodes[graph.edge_target], graph.distances])
    return multigraph(edges, graph.edge_multiplicities)


@pytest.mark.parametrize("name", sorted(CRYSTALS.keys() - {LONE}))
def test_graphs_are_those_of_the_reference(name):
    row = CRYSTALS[name]
    graph = graph_of(row)
    assert graph.spacegroup == row["spacegroup"]
    nodes = zip(graph.atomic_numbers.tolist(), graph.multiplicities.tolist(), strict=True)
    assert sorted(nodes) == [tuple(node) for node in row["nodes"]]
    recorded = np.array(row["edges"], dtype=float)
    expected, found = multigraph(recorded[:, :5], recorded[:, 5]), edges_of(graph)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=0, atol=1e-6)


def test_no_edge_is_added_again_where_the_reference_searches_in_a_larger_sphere():
    row = CRYSTALS[LONE]
    recorded = np.array(row["edges"], dtype=float)
    # It searched in 10, 20 and 40 angstrom for the lone atom, the last one: the others have each edge thrice.
    again = recorded[:, 2] != Element("Xe").Z
    recorded[again, 5] /= 3
    found = edges_of(graph_of(row))
    assert len(found) == 28 * 24
    assert np.allclose(found, multigraph(recorded[:, :5], recorded[:, 5]), rtol=0, atol=1e-6)
