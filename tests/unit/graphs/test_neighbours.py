import itertools
import json

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Element, Lattice, Structure

from castbench.graphs.asymmetric import asymmetric_unit
from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.neighbours import TIE, nearest_pairs
from crystals import cogn_graph

SQRT = np.sqrt


@pytest.mark.parametrize(
    ("name", "shells"),
    [  # of the first node: element of the neighbour, distance in lattice constants, how many
        ("rocksalt", [("Cl", 1 / 2, 6), ("Na", SQRT(1 / 2), 12), ("Cl", SQRT(3) / 2, 8)]),
        ("fcc", [("Cu", SQRT(1 / 2), 12), ("Cu", 1, 6), ("Cu", SQRT(3 / 2), 24)]),
        ("caesium chloride", [("Cl", SQRT(3) / 2, 8), ("Cs", 1, 6), ("Cs", SQRT(2), 12)]),
        ("diamond", [("C", SQRT(3) / 4, 4), ("C", SQRT(1 / 2), 12), ("C", SQRT(11) / 4, 12)]),
        ("perovskite", [("O", SQRT(1 / 2), 12), ("Ti", SQRT(3) / 2, 8), ("Sr", 1, 6)]),
    ],
)
def test_shells_of_textbook_crystals(prototypes, graph_of, name, shells):
    graph = graph_of(prototypes[name])
    to_first = graph.edge_target == 0
    found = sorted(
        zip(
            graph.distances[to_first] / prototypes[name].lattice.a,
            [Element.from_Z(z).symbol for z in graph.atomic_numbers[graph.edge_source[to_first]]],
            graph.edge_multiplicities[to_first],
            strict=True,
        )
    )
    assert len(found) == len(shells)
    for (distance, symbol, count), (expected_symbol, expected_distance, expected_count) in zip(
        found, shells, strict=True
    ):
        assert (symbol, count) == (expected_symbol, expected_count)
        assert distance == pytest.approx(expected_distance, abs=1e-6)


def brute_force(lattice: np.ndarray, positions: np.ndarray, centre: int, k: int, images: int) -> np.ndarray:
    """Distances from `centre` to its k nearest and all that tie, from every image within `images` cells."""
    shifts = np.array(list(itertools.product(range(-images, images + 1), repeat=3)))
    vectors = (positions[None] + shifts[:, None] - positions[centre]) @ lattice
    distances = np.sort(np.linalg.norm(vectors, axis=-1).ravel())[1:]  # without itself
    return distances[distances <= distances[k - 1] + TIE]


@pytest.mark.parametrize(
    ("lattice", "n"),
    [
        (np.eye(3) * 3.0, 1),
        (np.array([[3.1, 0.2, 0], [0.4, 4.2, 0.3], [0.7, -0.5, 5.3]]), 3),
        (np.array([[0.4, 4.2, 0.3], [3.1, 0.2, 0], [0.7, -0.5, 5.3]]), 3),  # left-handed
        (np.array([[3.0, 0, 0], [0, 3.0, 0], [1.0, 2.0, 40.0]]), 5),
        (np.array([[2.5, 0, 0], [2.0, 2.5, 0], [2.0, 2.0, 2.5]]), 2),  # far from reduced
    ],
)
def test_neighbours_are_those_of_brute_force(lattice, n):
    positions = np.random.default_rng(0).random((n, 3))
    pairs = nearest_pairs(lattice, positions, np.arange(n), 24)
    for centre in range(n):
        expected = brute_force(lattice, positions, centre, 24, 8)
        assert np.allclose(pairs.distance[pairs.centre == centre], expected, atol=1e-9)
    assert ((pairs.atom >= 0) & (pairs.atom < n)).all()


def test_distant_atoms_get_as_many_neighbours_as_close_ones_and_no_edge_twice():
    # The reference searches again with a doubled radius here, and keeps what the first search had found.
    lattice = np.diag([30.0, 30.0, 30.0])
    positions = np.array([[0.0, 0, 0], [0.03, 0, 0], [0.5, 0.52, 0.54]])
    pairs = nearest_pairs(lattice, positions, np.arange(3), 24)
    for centre in range(3):
        expected = brute_force(lattice, positions, centre, 24, 3)
        assert np.allclose(pairs.distance[pairs.centre == centre], expected, atol=1e-9)


def test_a_slab_in_much_vacuum(graph_of):
    graphene = Structure(Lattice.hexagonal(2.46, 500), ["C", "C"], [[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]])
    graph = graph_of(graphene)
    assert graph.edge_multiplicities.tolist() == [3, 6, 3, 6, 6]  # 24 neighbours in five shells
    assert graph.distances[0] == pytest.approx(2.46 / SQRT(3), abs=1e-5)


def test_two_hundred_atoms_without_symmetry():
    rng = np.random.default_rng(1)
    grid = np.array(list(itertools.product(range(6), repeat=3)))[:210] / 6
    positions = grid + rng.normal(0, 0.01, grid.shape)
    graph = cogn_graph(np.diag([15.0, 15.5, 16.0]), positions, rng.integers(1, 90, 210))
    assert len(graph.atomic_numbers) == 210
    assert (np.bincount(graph.edge_target, graph.edge_multiplicities) >= 24).all()


def property_of(
    numbers: np.ndarray, weights: np.ndarray, source: np.ndarray, target: np.ndarray, distances: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """A small coGN with fixed random parameters: three rounds of messages, then the mean over nodes, (8,)."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(100, 8))[numbers]
    basis = np.exp(-((distances[:, None] - np.linspace(0.5, 8, 8)) ** 2))
    for _ in range(3):
        inputs = np.hstack([basis, states[target], states[source]])
        messages = np.tanh(inputs @ rng.normal(size=(24, 8)) / 5) * counts[:, None]
        received = np.zeros_like(states)
        np.add.at(received, target, messages)
        states = states + np.tanh(received @ rng.normal(size=(8, 8)) / 10)
    return np.average(states, axis=0, weights=weights)


def property_of_graph(graph: CrystalGraph) -> np.ndarray:
    return property_of(
        graph.atomic_numbers, graph.multiplicities, graph.edge_source, graph.edge_target,
        graph.distances.astype(float), graph.edge_multiplicities,
    )  # fmt: skip


def property_of_cell(structure: Structure) -> np.ndarray:
    """Of every atom of the given cell, without symmetry, and the plain mean."""
    n = len(structure)
    pairs = nearest_pairs(structure.lattice.matrix, structure.frac_coords % 1.0, np.arange(n), 24)
    ones = np.ones(len(pairs.distance))
    return property_of(
        np.array(structure.atomic_numbers), np.ones(n), pairs.atom, pairs.centre, pairs.distance, ones
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spacegroup=st.integers(1, 230), seed=st.integers(0, 10**6))
def test_the_asymmetric_unit_stands_for_the_whole_cell(graph_of, random_crystal, spacegroup, seed):
    structure = random_crystal(spacegroup, seed)
    graph = graph_of(structure)
    assert len(graph.atomic_numbers) <= len(structure)
    assert np.allclose(property_of_graph(graph), property_of_cell(structure), atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spacegroup=st.integers(1, 230), seed=st.integers(0, 10**6))
def test_the_graph_does_not_depend_on_how_the_crystal_is_given(
    graph_of, edges_of, random_crystal, spacegroup, seed
):
    structure = random_crystal(spacegroup, seed)
    rng = np.random.default_rng(seed)
    expected = edges_of(graph_of(structure))
    shifted = structure.copy()
    shifted.translate_sites(range(len(structure)), rng.random(3), to_unit_cell=False)
    others = {
        "permuted": Structure.from_sites([structure[i] for i in rng.permutation(len(structure))]),
        "shifted": shifted,
        "supercell": structure * (2, 1, 1),
        "reduced": structure.get_reduced_structure("niggli"),
        "primitive": structure.get_primitive_structure(tolerance=0.01),
    }
    for name, other in others.items():
        found = edges_of(graph_of(other))
        assert found.shape == expected.shape, name
        assert np.allclose(found, expected, atol=1e-5), name


def test_merged_edges_expand_to_the_multigraph_of_the_reference(prototypes, graph_of, edges_of):
    for structure in prototypes.values():
        numbers = np.array(structure.atomic_numbers)
        unit = asymmetric_unit(structure.lattice.matrix, structure.frac_coords, numbers, 1e-4)
        pairs = nearest_pairs(unit.lattice, unit.positions, unit.representatives, 24)
        edges = unit.orbits[pairs.atom], pairs.centre, pairs.distance, np.ones(len(pairs.distance))
        multigraph = CrystalGraph(unit.atomic_numbers, unit.multiplicities, *edges)
        graph = graph_of(structure)
        assert len(graph.distances) < len(pairs.distance)
        assert np.allclose(edges_of(graph), edges_of(multigraph), atol=1e-6)
        assert np.allclose(property_of_graph(graph), property_of_graph(multigraph), atol=1e-6)


def test_no_two_edges_of_a_graph_are_parallel_and_equally_long(graph_of, random_crystal):
    graph = graph_of(random_crystal(62, 5))
    keys = np.column_stack([graph.edge_source, graph.edge_target, graph.distances.round(5)])
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_fewer_neighbours_can_be_asked_for(prototypes, graph_of):
    assert graph_of(prototypes["rocksalt"], neighbours=6).edge_multiplicities.tolist() == [6, 6]
    assert graph_of(prototypes["rocksalt"], neighbours=7).edge_multiplicities.tolist() == [12, 6, 6, 12]


@pytest.mark.parametrize(
    ("lattice", "positions", "reason"),
    [
        (np.eye(3) * 4, np.zeros((0, 3)), "no atoms"),
        (np.diag([4.0, 4, 0]), np.zeros((1, 3)), "no volume"),
        (np.eye(3) * 4, np.array([[0, 0, np.nan]]), "not finite"),
        (np.eye(3) * 4, np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]), "one place"),
        (np.eye(3) * 4, np.array([[0, 0, 0], [0, 0, 1 - 1e-6]]), "one place"),
    ],
)
def test_what_is_no_crystal_is_refused(lattice, positions, reason):
    with pytest.raises(ValueError, match=reason):
        cogn_graph(lattice, positions, np.full(len(positions), 6))


def test_real_crystals_have_as_many_nodes_as_the_paper_says(shared_data):
    sizes = []
    with zstandard.open(shared_data / "elastic4.jsonl.zst", "rt") as lines:
        for line in itertools.islice(lines, 0, None, 12):
            row = json.loads(line)
            graph = cogn_graph(
                Lattice.from_parameters(*row["cell"]).matrix,
                np.array(row["frac"]),
                np.array([Element(symbol).Z for symbol in row["species"]]),
            )
            sizes.append(len(graph.atomic_numbers))
            assert (np.bincount(graph.edge_target, graph.edge_multiplicities) >= 24).all()
            assert len(np.unique(graph.edge_target)) == len(graph.atomic_numbers)
    # CAST, Table 2: 3.67 (2.03) nodes for the elastic moduli.
    assert 3.2 < np.mean(sizes) < 4.2
