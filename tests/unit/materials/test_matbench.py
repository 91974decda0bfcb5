"""Matbench's files are read as they are published, and what is wrong with one is one clear line."""

import gzip
import hashlib
import json
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from castbench.errors import InputError
from castbench.labels import MATBENCH
from castbench.materials import matbench
from castbench.materials.matbench import Published, fetch_matbench, make_ids, published, read_values
from castbench.materials.sources import collect_materials
from matbench_data import values, write_task

JDFT, METAL = "matbench_jdft2d", "matbench_mp_is_metal"


def collect(folder: Path, *tasks: str):
    files = {task: str(folder / f"{task}.json.gz") for task in tasks}
    collect_materials({"source": "matbench", "files": files}, folder / "c.parquet", folder / "m.json")
    return pq.read_table(folder / "c.parquet"), json.loads((folder / "m.json").read_text())


def test_every_record_has_matbenchs_name_and_the_label_of_its_task(tmp_path):
    write_task(tmp_path, JDFT, 12)
    write_task(tmp_path, METAL, 5, turned=True)
    table, manifest = collect(tmp_path, JDFT, METAL)
    assert table["material_id"].to_pylist() == [
        *(f"mb-jdft2d-{i:02d}" for i in range(1, 13)),
        *(f"mb-mp-is-metal-{i}" for i in range(1, 6)),
    ]
    assert table[JDFT].to_pylist() == values(JDFT, 12) + [None] * 5
    assert table[METAL].to_pylist() == [None] * 12 + [1.0, 1.0, 0.0, 0.0, 0.0]
    assert table["formula"][0].as_py() == "LiF" and set(table["spacegroup"].to_pylist()) == {225}
    assert "energy_per_atom" not in table.column_names
    assert [(file["task"], file["n"], file["published"]) for file in manifest["files"]] == [
        (JDFT, 12, False),
        (METAL, 5, False),
    ]
    assert manifest["labels"][JDFT] == {"present": 12, "missing": 5, "invalid": 0}


def test_a_bad_record_keeps_the_names_of_the_others(tmp_path):
    write_task(tmp_path, JDFT, 4, overlapping=(1,))
    table, manifest = collect(tmp_path, JDFT)
    assert table["material_id"].to_pylist() == ["mb-jdft2d-1", "mb-jdft2d-3", "mb-jdft2d-4"]
    assert manifest["rejected"][0]["record"] == "mb-jdft2d-2 (matbench_jdft2d.json.gz:2)"


def test_the_published_files_are_known():
    for task in MATBENCH:
        known = published(task)
        assert known.url.startswith("https://") and known.url.endswith(f"{task}.json.gz")
        assert len(known.sha256) == 64
        assert next(make_ids(task, known.n)).endswith("-" + "1".zfill(len(str(known.n))))


@pytest.mark.parametrize("task", ["matbench_steels", "matbench_expt_gap", "matbench_colour"])
def test_a_task_without_structures_is_refused(tmp_path, task):
    with pytest.raises(InputError, match=f"{task}: is no Matbench task with structures; choose from"):
        fetch_matbench(task, tmp_path / "a.json.gz")


def repack(path: Path, **changes) -> None:
    content = json.loads(gzip.decompress(path.read_bytes())) | changes
    path.write_bytes(gzip.compress(json.dumps({k: v for k, v in content.items() if v is not None}).encode()))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "there is no such file; correct materials.path"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read to its end"),
        (lambda path: path.write_bytes(b"<html>not here</html>"), "cannot be read to its end"),
        (lambda path: path.write_bytes(gzip.compress(b"<html>")), "cannot be read to its end"),
        (
            lambda path: repack(path, columns=["composition", "exfoliation_en"]),
            "has no structures but composition, exfoliation_en",
        ),
        (
            lambda path: repack(path, columns=["structure", "n"]),
            "has no target exfoliation_en but structure, n",
        ),
        (lambda path: repack(path, index=None), "has no index"),
        (lambda path: repack(path, data=[[1]]), "a row is not a structure and a value"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, damage, said):
    damage(write_task(tmp_path, JDFT, 30))
    with pytest.raises(InputError, match=said) as error:
        collect(tmp_path, JDFT)
    assert "matbench_jdft2d.json.gz" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "c.parquet").exists()


def test_a_record_without_a_value_is_named(tmp_path):
    path = write_task(tmp_path, JDFT, 3)
    rows = json.loads(gzip.decompress(path.read_bytes()))["data"]
    rows[1][1] = None
    repack(path, data=rows)
    with pytest.raises(InputError, match=r"json.gz:2: None is no value of the target"):
        read_values(path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of invented files, which matminer is made to know; with another hash on demand."""
    folder = tmp_path / "served"
    path = write_task(folder, JDFT, 5)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def know(name: str = path.name, sha256: str = hashlib.sha256(path.read_bytes()).hexdigest()) -> Path:
        url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
        monkeypatch.setattr(matbench, "published", lambda task: Published(url, sha256, 5, "exfoliation_en"))
        return path

    yield know
    server.shutdown()
    server.server_close()


def test_a_download_is_verified(tmp_path, served):
    path = served()
    fetch_matbench(JDFT, tmp_path / "got" / path.name)
    assert (tmp_path / "got" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("known", "said"),
    [({"sha256": "0" * 64}, "not the published 0000000000000000…; start again"), ({"name": "gone"}, "404")],
)
def test_a_download_that_is_not_the_published_file_leaves_nothing(tmp_path, served, known, said):
    served(**known)
    with pytest.raises(InputError, match=said):
        fetch_matbench(JDFT, tmp_path / "got" / "a.json.gz")
    assert not any((tmp_path / "got").iterdir())


def test_the_published_file_is_known_by_its_hash(served):
    path = served()
    _, manifest = collect(path.parent, JDFT)
    assert [file["published"] for file in manifest["files"]] == [True]
