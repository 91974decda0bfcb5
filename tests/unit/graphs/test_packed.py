import json
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest

from castbench.errors import InputError
from castbench.graphs.packed import ARRAYS, PackedGraphs, PackedWriter

NAMES = ("rocksalt", "perovskite", "quartz")


@pytest.fixture
def folder(tmp_path, prototypes, graph_of):
    """A cache of four crystals, the third without a graph."""
    graphs = [graph_of(prototypes[name]) for name in NAMES]
    with PackedWriter(tmp_path / "graphs", {"neighbours": 24}, "0" * 64) as writer:
        writer.append(["a", "b"], graphs[:2])
        writer.append(["c", "d"], ["no atoms", graphs[2]])
    return tmp_path / "graphs"


def test_graphs_come_back_as_they_were(folder, prototypes, graph_of):
    packed = PackedGraphs.open(folder, source="0" * 64, verify=True)
    assert len(packed) == 4
    for crystal, name in zip((0, 1, 3), NAMES, strict=True):
        graph, found = graph_of(prototypes[name]), packed[crystal]
        for field in fields(graph):
            if field.name != "spacegroup":
                assert np.array_equal(getattr(found, field.name), getattr(graph, field.name))
    assert len(packed[2].atomic_numbers) == len(packed[2].distances) == 0
    n_edges = len(packed[1].distances)
    assert packed.index().to_pylist()[1:3] == [
        {"material_id": "b", "status": "ok", "n_nodes": 3, "n_edges": n_edges, "spacegroup": 221},
        {"material_id": "c", "status": "failed: no atoms", "n_nodes": 0, "n_edges": 0, "spacegroup": None},
    ]


def test_the_manifest_counts(folder, prototypes, graph_of):
    manifest = PackedGraphs.open(folder).manifest
    sizes = [2, 3, 2]
    assert (manifest["n_graphs"], manifest["n_failed"], manifest["n_nodes"]) == (4, 1, 7)
    assert manifest["nodes_mean"] == pytest.approx(np.mean(sizes))
    assert manifest["nodes_std"] == pytest.approx(np.std(sizes))
    expanded = sum(graph_of(prototypes[name]).edge_multiplicities.sum() for name in NAMES)
    assert manifest["n_edges_expanded"] == expanded > manifest["n_edges"]


def test_arrays_are_mapped_and_read_only(folder):
    packed = PackedGraphs.open(folder)
    for name, dtype in ARRAYS.items():
        array = getattr(packed, name)
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_no_crystals_at_all(tmp_path):
    with PackedWriter(tmp_path, {}, "0"):
        pass
    packed = PackedGraphs.open(tmp_path, verify=True)
    assert len(packed) == 0
    assert len(packed.distances) == 0


def test_a_killed_run_leaves_no_cache(folder, prototypes, graph_of):
    with pytest.raises(KeyboardInterrupt), PackedWriter(folder, {"neighbours": 24}, "0" * 64) as writer:
        writer.append(["a"], [graph_of(prototypes["fcc"])])
        raise KeyboardInterrupt
    with pytest.raises(InputError, match=r"no readable manifest\.json"):
        PackedGraphs.open(folder)


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "distances.npy").unlink(), "distances.npy: missing"),
        (lambda folder: (folder / "index.parquet").unlink(), "index.parquet: missing"),
        (lambda folder: (folder / "edge_source.npy").write_bytes(b""), "edge_source.npy: missing or cut"),
        (lambda folder: flip_last_byte(folder / "edge_target.npy"), "edge_target.npy: does not match"),
        (lambda folder: (folder / "manifest.json").write_text('{"format"'), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not of format 2"),
        (lambda folder: edit_manifest(folder, format=0), "not of format 2"),
        (lambda folder: edit_manifest(folder, source="1" * 64), "graphs of other materials"),
        (lambda folder: edit_manifest(folder, n_nodes=8), "atomic_numbers.npy: not 8 values of uint8"),
    ],
)
def test_a_damaged_or_stale_cache_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        PackedGraphs.open(folder, source="0" * 64, verify=True)
    assert "\n" not in str(error.value)


def test_memory_does_not_grow_with_the_number_of_crystals(tmp_path, prototypes, graph_of):
    graph = graph_of(prototypes["quartz"])

    def peak(chunks):
        tracemalloc.start()
        with PackedWriter(tmp_path, {}, "0") as writer:
            for _ in range(chunks):
                writer.append(["x"] * 10, [graph] * 10)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)  # imports and caches
    assert peak(200) < peak(10) + 50_000
