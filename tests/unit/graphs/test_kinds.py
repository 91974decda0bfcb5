"""The graphs of the encoders other than coGN."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from castbench.graphs.kinds import KINDS, MEGNET_RADIUS, structure_graph
from castbench.graphs.packed import PackedGraphs, PackedWriter
from crystals import varied_crystals


def build(encoder, structure, neighbours=12):
    settings = {"structure_encoder": encoder, "neighbours": neighbours, "symprec": 1e-4}
    numbers = np.array(structure.atomic_numbers)
    return structure_graph(structure.lattice.matrix, structure.frac_coords, numbers, settings)


def test_faces_and_distances_make_up_the_volume_of_the_crystal():
    for structure in varied_crystals():
        graph = build("congn", structure)
        pyramids = graph.ridge_areas * graph.distances / 6
        volume = (graph.multiplicities[graph.edge_target] * pyramids).sum()
        assert volume == pytest.approx(structure.get_primitive_structure(0.01).volume, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "faces"),
    [("fcc", 12), ("caesium chloride", 14), ("diamond", 16)],  # dodecahedron, truncated octahedron, ...
)
def test_voronoi_cells_of_textbook_crystals(prototypes, name, faces):
    graph = build("congn", prototypes[name])
    assert np.bincount(graph.edge_target).tolist() == [faces] * len(graph.atomic_numbers)


def test_a_thin_cell_has_the_faces_of_the_crystal(prototypes):
    thin = prototypes["rocksalt"].get_primitive_structure() * (1, 1, 4)
    graph, expected = build("congn", thin), build("congn", prototypes["rocksalt"])
    assert np.allclose(np.sort(graph.ridge_areas), np.sort(expected.ridge_areas), atol=1e-4)


def test_a_layer_far_from_the_next_has_faces_towards_it():
    graph = build("congn", Structure(Lattice.tetragonal(3, 50), ["C"], [[0, 0, 0]]))
    assert np.sort(graph.ridge_areas) == pytest.approx([9, 9, 150, 150, 150, 150], rel=1e-4)
    assert np.sort(graph.distances) == pytest.approx([3, 3, 3, 3, 50, 50])


def test_bonds_are_mutual_and_each_knows_its_reverse():
    for structure in varied_crystals():
        graph = build("alignn", structure)
        back = graph.edge_reverse
        assert np.array_equal(graph.edge_source[back], graph.edge_target)
        assert np.array_equal(graph.edge_target[back], graph.edge_source)
        assert np.allclose(graph.distances[back], graph.distances, atol=1e-5)
        assert np.bincount(graph.edge_target).min() >= 12
        # As many bonds into the atoms of a cell as out of them, between every two orbits.
        weights = graph.multiplicities[graph.edge_target]
        n = len(graph.atomic_numbers)
        into = np.bincount(graph.edge_target * n + graph.edge_source, weights, minlength=n * n)
        assert np.array_equal(into.reshape(n, n), into.reshape(n, n).T)


def test_an_atom_is_joined_with_whoever_has_it_among_his_nearest():
    # The far atom has the pair among its nearest; the pair has nearer ones.
    lattice = Lattice.orthorhombic(3, 3, 12)
    structure = Structure(lattice, ["C", "N", "O"], [[0, 0, 0], [0.5, 0.5, 0.12], [0.1, 0.2, 0.5]])
    own, mutual = build("cgcnn", structure), build("alignn", structure)
    degree = [np.bincount(graph.edge_target, graph.edge_multiplicities) for graph in (own, mutual)]
    assert degree[0].tolist() == [12, 12, 12]
    assert (degree[1] >= degree[0]).all() and degree[1].sum() > degree[0].sum()


@pytest.mark.parametrize("lattice", [Lattice.hexagonal(4, 6.5), Lattice.orthorhombic(4, 5.1, 6.2)])
def test_a_bond_of_exactly_megnets_radius_is_one_however_the_crystal_lies(lattice):
    structure = Structure(lattice, ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.37]])
    rotations = [np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0] for seed in range(6)]
    forms = [Structure(lattice.matrix @ q, structure.species, structure.frac_coords) for q in rotations]
    for form in (structure, structure.get_reduced_structure("niggli"), *forms):
        graph = build("megnet", form)
        bonds = (graph.multiplicities[graph.edge_target] * graph.edge_multiplicities).sum()
        assert bonds == sum(map(len, structure.get_all_neighbors(MEGNET_RADIUS + 1e-8)))


def test_megnet_joins_all_within_its_radius_and_leaves_no_atom_alone(prototypes):
    for name in ("rocksalt", "perovskite", "quartz"):
        graph = build("megnet", prototypes[name])
        expected = sum(len(near) for near in prototypes[name].get_all_neighbors(MEGNET_RADIUS))
        weights = graph.multiplicities[graph.edge_target] * graph.edge_multiplicities
        primitive = prototypes[name].get_primitive_structure()
        assert weights.sum() == pytest.approx(expected * len(primitive) / len(prototypes[name]))
    lone = build("megnet", Structure(Lattice.cubic(5), ["Xe"], [[0, 0, 0]]))
    assert lone.distances.tolist() == [5.0] and lone.edge_multiplicities.tolist() == [6.0]


def test_other_encoders_count_the_atoms_of_the_primitive_cell(prototypes):
    for encoder in KINDS.keys() - {"cogn"}:
        assert build(encoder, prototypes["rocksalt"]).multiplicities.tolist() == [1, 1]
        assert build(encoder, prototypes["diamond"] * (1, 2, 1)).multiplicities.tolist() == [2]


@pytest.mark.parametrize("encoder", KINDS)
def test_packed_graphs_have_the_arrays_of_their_kind(encoder, tmp_path, prototypes):
    graphs = [build(encoder, structure) for structure in prototypes.values()]
    for kind in ("alignn", encoder):  # nothing is left of graphs of another kind
        made = [build(kind, structure) for structure in prototypes.values()]
        with PackedWriter(tmp_path, {"structure_encoder": kind}, "0", KINDS[kind].arrays) as writer:
            writer.append(list(prototypes), made)
    packed = PackedGraphs.open(tmp_path, verify=True)
    assert packed.edge_arrays.keys() - set(KINDS[encoder].arrays) == {
        "edge_source", "edge_target", "distances", "edge_multiplicities",
    }  # fmt: skip
    for crystal, graph in enumerate(graphs):
        for name in packed.edge_arrays:
            assert np.array_equal(getattr(packed[crystal], name), getattr(graph, name))
    assert {path.stem for path in tmp_path.glob("*.npy")} == {
        "node_offsets", "edge_offsets", "atomic_numbers", "multiplicities", *packed.edge_arrays,
    }  # fmt: skip


@pytest.mark.parametrize(("height", "distances"), [(3.99, [3.0, 3.99]), (4.01, [3.0])])
def test_megnets_radius_is_that_of_its_publication(height, distances):
    """4 angstrom: more than the height of one cell and less than that of the other."""
    graph = build("megnet", Structure(Lattice.tetragonal(3, height), ["C"], [[0, 0, 0]]))
    assert graph.distances == pytest.approx(distances)


def test_symmetry_that_cannot_be_told_twice_alike_is_not_used_and_changes_no_sum(prototypes, monkeypatch):
    expected = {name: build("alignn", structure) for name, structure in prototypes.items()}
    monkeypatch.setattr("castbench.graphs.reciprocal.to_representatives", lambda *_: None)
    for name, structure in prototypes.items():
        graphs = build("alignn", structure), expected[name]
        assert len(graphs[0].atomic_numbers) >= len(graphs[1].atomic_numbers)
        atoms, bonds = zip(
            *((g.multiplicities.sum(), g.multiplicities[g.edge_target].sum()) for g in graphs), strict=True
        )
        assert atoms[0] == pytest.approx(atoms[1]) and bonds[0] == pytest.approx(bonds[1]), name
