import logging

import numpy as np
import pytest
from pymatgen.core import Structure

from castbench.graphs.build import CHUNK, build_graphs
from castbench.graphs.packed import PackedGraphs
from castbench.provenance import sha256_file

SETTINGS = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4}


def row_of(name: str, structure: Structure):
    return name, structure.lattice.matrix, [site.specie.symbol for site in structure], structure.frac_coords


def test_rows_are_those_of_the_materials(tmp_path, write_materials, prototypes, graph_of):
    materials = write_materials([row_of(name, structure) for name, structure in prototypes.items()])
    build_graphs(SETTINGS, materials, tmp_path / "graphs", threads=1)
    packed = PackedGraphs.open(tmp_path / "graphs", source=sha256_file(materials), verify=True)
    index = packed.index()
    assert index["material_id"].to_pylist() == list(prototypes)
    assert index["spacegroup"].to_pylist() == [225, 225, 221, 227, 221, 186, 154]
    for crystal, structure in enumerate(prototypes.values()):
        assert np.array_equal(packed[crystal].distances, graph_of(structure).distances)


def test_bad_crystals_are_counted_and_the_others_go_on(tmp_path, write_materials, prototypes, caplog):
    good = row_of("good", prototypes["fcc"])
    cube = np.eye(3) * 4
    materials = write_materials(
        [
            ("no-element", cube, ["Qq"], [[0, 0, 0]]),
            ("flat", np.diag([4.0, 4, 0]), ["C"], [[0, 0, 0]]),
            good,
            ("overlap", cube, ["C", "C"], [[0, 0, 0], [0, 0, 0]]),
            ("empty", cube, [], []),
            ("short", cube, ["C", "C"], [[0, 0, 0]]),
            good,
        ]
    )
    with caplog.at_level(logging.WARNING):
        build_graphs(SETTINGS, materials, tmp_path / "graphs", threads=1)
    packed = PackedGraphs.open(tmp_path / "graphs")
    statuses = packed.index()["status"].to_pylist()
    assert statuses[2] == statuses[6] == "ok"
    assert [status for status in statuses if status != "ok"] == [
        "failed: unknown element 'Qq'",
        "failed: the cell has no volume",
        "failed: two atoms are in one place",
        "failed: no atoms",
        "failed: species and coordinates are of different lengths",
    ]
    assert packed.node_offsets.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert packed.manifest["n_failed"] == 5
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 5
    assert warnings[0] == "no-element: no graph: unknown element 'Qq'"


@pytest.fixture
def many(write_materials):
    """More crystals than two chunks hold, of one to three atoms."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(2 * CHUNK + 10):
        n = 1 + i % 3
        lattice = np.eye(3) * 4 + rng.normal(0, 0.2, (3, 3))
        rows.append((f"m{i}", lattice, ["C", "O", "N"][:n], rng.random((n, 3))))
    return write_materials(rows)


def test_files_do_not_depend_on_the_number_of_workers(tmp_path, many):
    build_graphs(SETTINGS, many, tmp_path / "one", threads=1)
    build_graphs(SETTINGS, many, tmp_path / "two", threads=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in set(names) - {"cost.json"}:  # seconds
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_only_a_current_and_sound_cache_is_kept(tmp_path, write_materials, prototypes):
    materials, folder = write_materials([row_of("a", prototypes["fcc"])]), tmp_path / "graphs"
    array = folder / "distances.npy"

    def rebuilt(**settings) -> bool:
        before = array.stat().st_ino, array.stat().st_mtime_ns
        build_graphs(SETTINGS | settings, materials, folder, threads=1)
        return before != (array.stat().st_ino, array.stat().st_mtime_ns)

    build_graphs(SETTINGS, materials, folder, threads=1)
    assert not rebuilt()
    assert rebuilt(neighbours=12)
    assert len(PackedGraphs.open(folder).distances) == 1  # twelve equal neighbours
    assert rebuilt(neighbours=24)
    array.write_bytes(array.read_bytes()[:-1])
    assert rebuilt()
    assert not rebuilt()
    write_materials([row_of("a", prototypes["diamond"])])
    assert rebuilt()
    (folder / "manifest.json").unlink()
    assert rebuilt()
    PackedGraphs.open(folder, source=sha256_file(materials), verify=True)
