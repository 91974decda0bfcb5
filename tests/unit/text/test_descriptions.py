import ctypes
import gc
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.errors import InputError
from castbench.text.descriptions import SHARD_SCHEMA, Worker, describe_shard, gather_descriptions

STRUCTURE = pa.struct(
    [
        ("lattice", pa.list_(pa.float64())),
        ("species", pa.list_(pa.string())),
        ("frac_coords", pa.list_(pa.float64())),
    ]
)


def rocksalt(a: float, cation: str, anion: str) -> dict[str, list]:
    """Primitive cell, `a` in angstrom."""
    lattice = (np.ones((3, 3)) - np.eye(3)) * a / 2
    return {
        "lattice": lattice.ravel().tolist(),
        "species": [cation, anion],
        "frac_coords": [0, 0, 0, 0.5, 0.5, 0.5],
    }


def write_materials(path: Path, structures: list[dict], texts: list[str | None] | None = None) -> Path:
    ids = [f"m-{i}" for i in range(len(structures))]
    columns = {
        "material_id": pa.array(ids, pa.string()),
        "structure": pa.array(structures, STRUCTURE),
        "text": pa.array(texts or [None] * len(ids), pa.string()),
    }
    pq.write_table(pa.table(columns), path)
    return path


def call(worker: Worker, item: object) -> tuple[tuple[str | None, str], float]:
    start = time.perf_counter()
    return worker(item), time.perf_counter() - start


def test_a_hang_in_c_costs_its_time_limit_alone() -> None:
    with Worker(time.sleep, gc.collect, time_limit=1.0) as worker:
        worker.start()
        answer, seconds = call(worker, 1000)
        assert answer == (None, "timeout") and 1.0 <= seconds < 20.0
        assert worker(0) == (None, "ok")  # a new process
        first = worker.process.pid
        assert worker("a") == (None, "failed: TypeError: 'str' object cannot be interpreted as an integer")
        assert worker(0) == (None, "ok") and worker.process.pid == first  # an exception costs no process


def test_a_crash_costs_that_item_alone() -> None:
    with Worker(ctypes.string_at, gc.collect, time_limit=60.0) as worker:
        assert worker(8) == (None, "failed: worker died with exit code -11")
        assert worker(1.5)[1].startswith("failed: ArgumentError: ")
        assert worker.process.is_alive()


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with Worker(time.sleep, json.loads, time_limit=1.0) as worker:
        with pytest.raises(RuntimeError, match="worker does not start"):
            worker(0)


def test_provided_texts_in_two_shards(tmp_path: Path) -> None:
    texts = [f"text {i}" if i % 3 else None for i in range(2501)]
    materials = write_materials(tmp_path / "m.parquet", [rocksalt(5.6, "Na", "Cl")] * len(texts), texts)
    settings = {"source": "provided", "time_limit": 1, "shards": 4}
    shards = [tmp_path / f"{s}.parquet" for s in range(4)]
    for s in range(4):
        describe_shard(settings, materials, s, shards[s])
    assert pq.read_table(shards[3])["row"].to_pylist() == list(range(3, 2501, 4))
    gather_descriptions(shards, tmp_path / "d.parquet", tmp_path / "s.json")
    table = pq.read_table(tmp_path / "d.parquet")
    assert table.column_names == ["material_id", "text", "status", "seconds"]
    assert table["material_id"].to_pylist() == [f"m-{i}" for i in range(2501)]
    assert table["text"].to_pylist() == texts
    statistics = json.loads((tmp_path / "s.json").read_text())
    assert statistics["by_status"] == {"provided": 1667, "missing": 834}
    assert statistics["n"] == 2501 and statistics["success_rate"] == pytest.approx(1667 / 2501)
    with pytest.raises(InputError, match=r"d\.parquet: row 2 is missing or doubled"):
        gather_descriptions(shards[:2], tmp_path / "d.parquet", tmp_path / "s.json")


def test_what_is_not_provided_is_generated_and_served_text_brought_to_one_form(tmp_path: Path) -> None:
    served = "Al₂O₃ crystallizes in the trigonal R̅3c space group. Al³⁺ is bonded to six O²⁻ atoms."
    materials = write_materials(
        tmp_path / "m.parquet", [rocksalt(5.69, "Na", "Cl")] * 3, [served, None, "NaCl, Fm-3m"]
    )
    settings = {"source": "provided_or_generated", "time_limit": 120, "shards": 1}
    describe_shard(settings, materials, 0, tmp_path / "0.parquet")
    rows = pq.read_table(tmp_path / "0.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["provided", "ok", "provided"]
    assert rows[0]["text"] == (
        "Al2O3 crystallizes in the trigonal R-3c space group. Al3+ is bonded to six O2- atoms."
    )
    assert rows[1]["text"].startswith("NaCl is Halite, Rock Salt structured")
    assert rows[2]["text"] == "NaCl, Fm-3m" and rows[2]["seconds"] == 0 < rows[1]["seconds"]


def test_no_crystals(tmp_path: Path) -> None:
    materials = write_materials(tmp_path / "m.parquet", [])
    describe_shard({"source": "generate", "time_limit": 1, "shards": 1}, materials, 0, tmp_path / "0.parquet")
    gather_descriptions([tmp_path / "0.parquet"], tmp_path / "d.parquet", tmp_path / "s.json")
    assert pq.read_table(tmp_path / "d.parquet").num_rows == 0
    assert json.loads((tmp_path / "s.json").read_text())["success_rate"] == 0.0


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    materials = write_materials(tmp_path / "m.parquet", [])
    settings = {"source": "robot", "time_limit": 1, "shards": 1}
    with pytest.raises(InputError, match=r"text\.source robot: unknown; use one of generate, provided, "):
        describe_shard(settings, materials, 0, tmp_path / "0.parquet")
    assert not (tmp_path / "0.parquet").exists()


def test_descriptions_of_robocrystallographer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole path in a real worker: textbook crystals, and one that has no text."""
    unknown = rocksalt(5.0, "Na", "Cl") | {"species": ["Na", "Qq"]}
    structures = [rocksalt(5.69, "Na", "Cl"), unknown, rocksalt(4.25, "Mg", "O")]
    materials = write_materials(tmp_path / "m.parquet", structures)
    settings = {"source": "generate", "time_limit": 120, "shards": 1}
    describe_shard(settings, materials, 0, tmp_path / "0.parquet")
    rows = pq.read_table(tmp_path / "0.parquet").to_pylist()
    assert [row["status"].partition(":")[0] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["text"] is None and "m-1: no description (failed: " in caplog.text
    assert rows[0]["text"].startswith(
        "NaCl is Halite, Rock Salt structured and crystallizes in the cubic Fm-3m space group. "
        "Na(1)1+ is bonded to six equivalent Cl(1)1- atoms to form a mixture of corner and edge-sharing "
        "NaCl6 octahedra."
    )
    assert "All Na(1)-Cl(1) bond lengths are 2.85" in rows[0]["text"]
    assert "Mg(1)2+" in rows[2]["text"] and "O(1)2-" in rows[2]["text"]
    assert 0 < rows[2]["seconds"] < 120


def test_seconds_are_added_up_and_their_quantiles_given(tmp_path: Path) -> None:
    rows = [
        {"row": i, "material_id": f"m-{i}", "text": "t", "status": "ok", "seconds": float(i)}
        for i in range(101)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SHARD_SCHEMA), tmp_path / "0.parquet")
    gather_descriptions([tmp_path / "0.parquet"], tmp_path / "d.parquet", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["seconds"] == {"total": 5050.0, "median": 50.0, "p95": 95.0, "max": 100.0}
    assert found["success_rate"] == 1


def test_a_worker_has_a_fixed_seed_of_hashes_and_this_process_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts follow the order of sets."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    with Worker(os.getenv, gc.collect, time_limit=60.0) as worker:
        assert worker("PYTHONHASHSEED") == ("0", "ok")
        assert os.environ["PYTHONHASHSEED"] == "7"
