"""The download: the real client against a local server of ours, and everything that goes wrong on the way."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from castbench.errors import InputError
from castbench.materials import materials_project, sources
from castbench.materials.records import Columns
from castbench.materials.snapshot import read_documents, read_header, write_snapshot
from mp_server import Fault, MaterialsProject, make_document, to_unicode

from .conftest import make_cif

KEY = "castbench0123456789castbench0123"
Document = dict[str, Any]
Run = Callable[..., tuple[pa.Table, dict[str, Any]]]
# Real crystals are not needed here: these differ in what matters, and their symmetry is quick.
SALT = {
    "lattice": [[4.1, 0, 0], [0, 4.1, 0], [0, 0, 4.1]],
    "species": ["Cs", "Cl"],
    "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
    "energy_per_atom": -3.4,
    "formation_energy_per_atom": -2.1,
    "energy_above_hull": 0.0,
    "band_gap": 5.1,
    **{
        f"{letter}_{kind}": value
        for letter, value in (("k", 17.0), ("g", 9.0))
        for kind in ("voigt", "reuss", "vrh")
    },
}


def salt(identifier: str, scale: float = 1.0, **changes: Any) -> Document:
    """A document for caesium chloride with every label."""
    lattice = [[scale * x for x in row] for row in SALT["lattice"]]
    material = Columns({}).read(SALT | {"lattice": lattice}, identifier, "test")
    return make_document(identifier, material.crystal, material.labels) | changes


def salts(count: int = 25) -> list[Document]:
    """Documents mp-101 and on, that differ in energy."""
    return [salt(f"mp-{i}", energy_per_atom=-i / 100) for i in range(101, 101 + count)]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MaterialsProject]]:
    """Start servers that the client of this process talks to, with pages of ten and no long pauses."""
    from mp_api.client.core.settings import MAPI_CLIENT_SETTINGS

    running = []

    def start(documents: list[Document], *arguments: Any, **options: Any) -> MaterialsProject:
        server = MaterialsProject(documents, *arguments, **options).__enter__()
        running.append(server)
        # The client reads MP_API_ENDPOINT into this when it is imported.
        monkeypatch.setattr(MAPI_CLIENT_SETTINGS, "ENDPOINT", server.url)
        return server

    monkeypatch.setenv("MP_API_KEY", KEY)
    monkeypatch.setattr(materials_project, "PAGE", 10)
    monkeypatch.setattr(materials_project, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(materials_project, "ATTEMPTS", 3)
    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Collect into a folder; return the table and the manifest."""

    def collect(
        folder: str = "live", archive: Path | None = None, **settings: Any
    ) -> tuple[pa.Table, dict[str, Any]]:
        output, manifest = tmp_path / folder / "collected.parquet", tmp_path / folder / "manifest.json"
        settings = {"source": "materials_project", **settings}
        sources.collect_materials(settings, output=output, manifest=manifest, snapshot=archive)
        return pq.read_table(output), json.loads(manifest.read_text())

    return collect


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """The one line that a collection ends with."""

    def collect(**settings: Any) -> str:
        with pytest.raises(InputError) as error:
            run(**settings)
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 500
        assert KEY not in message
        return message

    return collect


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("collected.parquet", "manifest.json")}


def ids(table: pa.Table) -> list[str]:
    return table.column("material_id").to_pylist()


# The download


def test_download_asks_for_pages_of_the_fields_and_says_so(serve, run, tmp_path):
    server = serve([*salts(25), salt("mp-99", deprecated=True)])
    table, manifest = run()
    assert ids(table) == [f"mp-{i}" for i in range(101, 126)]
    assert table.column("k_voigt").to_pylist() == [17.0] * 25
    assert table.column("g_vrh").to_pylist() == [9.0] * 25
    assert table.column("energy_per_atom").to_pylist() == [-i / 100 for i in range(101, 126)]
    assert table.column("origin").unique().to_pylist() == ["materials_project"]
    assert table.column("text").null_count == 25
    assert server.pages() == [1, 2, 3]
    assert {path for path, _, _ in server.log} == {"/heartbeat", "/materials/summary/"}
    asked = [query for _, query, _ in server.log if "_page" in query]
    assert {query["_fields"] for query in asked} == {",".join(materials_project.FIELDS)}
    assert {query["_sort_fields"] for query in asked} == {"material_id"}
    download = manifest["download"]
    assert download["database_version"] == "2025.09.25"
    assert download["documents"] == manifest["n_read"] == manifest["n_kept"] == 25
    assert download["query"] == {"deprecated": False, "include_gnome": False}
    assert download["fields"] == list(materials_project.FIELDS)
    assert download["endpoint"] == server.url
    assert re.fullmatch(r"mp-api \d+\.\d+\.\d+", download["client"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", download["downloaded"])
    assert manifest["labels"]["band_gap"] == {"present": 25, "missing": 0, "invalid": 0}
    assert manifest["licence"].startswith("CC-BY-4.0 (GNoME")
    assert manifest["citation"].endswith("10.1063/1.4812323; database version 2025.09.25")
    assert len(manifest["files"][0]["sha256"]) == 64
    assert {path.name for path in (tmp_path / "live").iterdir()} == {
        "collected.parquet",
        "manifest.json",
        "snapshot.jsonl.zst",
    }


def test_without_an_order_pages_overlap(serve):
    """The server shuffles where it is asked for no order, as a database may: our order is needed."""
    serve(salts(25))
    summary, _ = materials_project.connect()
    first, second = (
        {one["material_id"] for one in summary.search(deprecated=False, fields=["material_id"], **page)}
        for page in ({"chunk_size": 10, "num_chunks": 1, "_page": number} for number in (1, 2))
    )
    assert first & second


def test_replay_gives_the_same_bytes_without_key_or_network(serve, run, tmp_path, monkeypatch):
    server = serve(salts(25), {f"mp-{i}": f"Salt {i}." for i in range(101, 120)})
    archive = tmp_path / "archive" / "salts.jsonl.zst"
    run("live", archive, descriptions=True)
    assert not (tmp_path / "live" / "snapshot.jsonl.zst").exists()
    moved = archive.rename(tmp_path / "elsewhere.jsonl.zst")
    asked = len(server.log)
    monkeypatch.delenv("MP_API_KEY")
    run("replay", descriptions=True, snapshot=str(moved), database_version="2025.09.25")
    assert files_of(tmp_path / "replay") == files_of(tmp_path / "live")
    assert len(server.log) == asked


def test_descriptions_come_only_where_they_are_asked_for(serve, run, tmp_path, monkeypatch):
    monkeypatch.setattr(materials_project, "IDS", 4)
    texts = {f"mp-{i}": f"Cs⁺ is in P1̅, Na₂O {i}." for i in range(101, 120)}
    server = serve(salts(25), texts)
    table, _ = run(descriptions=True)
    assert table.column("text").to_pylist() == [texts.get(name) for name in ids(table)]
    batches = [query["material_ids"].split(",") for path, query, _ in server.log if "robocrys" in path]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4, 1]
    # A snapshot with them serves a configuration without.
    table, _ = run("plain", snapshot=str(tmp_path / "live" / "snapshot.jsonl.zst"), descriptions=False)
    assert table.column("text").null_count == 25


def test_ids_are_opaque_strings(serve, run):
    """Alphabetic ids stay as they are, also where the endpoints spell them differently, and odd ones too."""
    documents = [
        salt(name, energy_per_atom=-i) for i, name in enumerate(("mp-aaaaaama", "mp-149", "x y/ü", "mvc-7"))
    ]
    serve(documents, {"mp-312": "Text of the first.", "mp-aaaaaaft": "Text of silicon."})
    table, _ = run(descriptions=True)
    assert dict(zip(ids(table), table.column("text").to_pylist(), strict=True)) == {
        "mp-aaaaaama": "Text of the first.",
        "mp-149": "Text of silicon.",
        "mvc-7": None,
        "x y/ü": None,
    }


def test_null_energies_and_missing_moduli_are_missing_labels(serve, run):
    documents = salts(3)
    documents[0] |= {"energy_per_atom": None, "energy_above_hull": None, "bulk_modulus": None}
    documents[1] |= {"shear_modulus": {"voigt": 10.0, "reuss": None}}
    table, manifest = run_documents(serve, run, documents)
    assert table.column("energy_per_atom").to_pylist() == [None, -1.02, -1.03]
    assert table.column("k_vrh").to_pylist() == [None, 17.0, 17.0]
    assert table.column("g_voigt").to_pylist() == [9.0, 10.0, 9.0]
    assert table.column("g_vrh").to_pylist() == [9.0, None, 9.0]
    assert manifest["labels"]["energy_above_hull"] == {"present": 2, "missing": 1, "invalid": 0}


def run_documents(serve, run, documents: list[Document], **settings: Any) -> tuple[pa.Table, dict[str, Any]]:
    serve(documents)
    return run(**settings)


def test_gnome_is_not_asked_for_and_other_noncommercial_entries_are_left_out(serve, run):
    def meta(batch: str) -> Document:
        return {"builder_meta": {"license": "BY-NC", "batch_id": batch}}

    server = serve([*salts(3), salt("mp-7", **meta("gnome_r2scan_statics")), salt("mp-8", **meta("other"))])
    server.licences.add("BY-NC")  # a user who has agreed to these terms is served them
    table, manifest = run()
    assert ids(table) == ["mp-101", "mp-102", "mp-103"]
    assert manifest["by_reason"] == {"non-commercial licence": 1}


def test_one_id_with_two_structures_in_two_pages(serve, run):
    documents = salts(12)
    documents[10] = salt("mp-110", scale=1.1)  # the last of page 1 and the first of page 2
    documents[11] = documents[0]
    table, manifest = run_documents(serve, run, documents)
    assert len(ids(table)) == 10
    assert manifest["by_reason"] == {"duplicate id": 1, "repeated record": 1}
    lattice = (
        table.filter(pa.compute.equal(table["material_id"], "mp-110"))
        .column("structure")[0]
        .as_py()["lattice"]
    )
    assert lattice[0] == 4.1


def test_one_id_with_two_structures_in_two_files(collect, tmp_path):
    atoms = ("Cs1 Cs 0 0 0 1", "Cl1 Cl 0.5 0.5 0.5 1")
    for folder, a in (("first", "4.1"), ("second", "4.2")):
        (tmp_path / "cifs" / folder).mkdir(parents=True)
        (tmp_path / "cifs" / folder / "salt.cif").write_text(make_cif(*atoms, a=a))
    table, manifest = collect(tmp_path / "cifs")
    assert ids(table) == ["salt"]
    assert manifest["by_reason"] == {"duplicate id": 1}


# What goes wrong, and passes


@pytest.mark.parametrize(
    "fault",
    [
        Fault("429", page=2, times=2, headers={"Retry-After": "1"}),
        Fault("500", page=2, times=2),
        Fault("502", page=2, times=5),
        Fault("503", page=2, times=2),
        Fault("slow", page=2, times=5, seconds=0.6),
        Fault("cut", page=2, times=2),
        Fault("broken", page=2, times=2),
        Fault("short", page=2),
        Fault("500", path="/heartbeat", times=2),
        Fault("500", path="/materials/robocrys/", times=2),
        Fault("broken", path="/materials/robocrys/", times=2),
    ],
    ids=lambda fault: f"{fault.kind}{fault.path.replace('/', '-')}",
)
def test_passing_faults_are_outlasted(serve, run, monkeypatch, fault):
    monkeypatch.setattr(materials_project, "TIMEOUT", 0.3)
    server = serve(salts(25), {"mp-101": "Salt."})
    server.faults.append(fault)
    started = time.monotonic()
    table, _ = run(descriptions=True)
    assert ids(table) == [f"mp-{i}" for i in range(101, 126)]
    assert fault.times == 0
    if fault.headers:
        assert time.monotonic() - started > 1


def test_lasting_faults_end_in_one_line_and_keep_the_pages(serve, run, refused, tmp_path):
    server = serve(salts(25))
    server.faults.append(Fault("500", page=3, times=3))
    message = refused()
    assert "page 3: REST query returned with error status code 500" in message
    assert "only what is missing is asked for" in message
    assert {path.name for path in (tmp_path / "live" / "pages").iterdir()} == {
        "00001.jsonl.zst",
        "00002.jsonl.zst",
    }
    server.log.clear()
    table, _ = run()
    assert server.pages() == [3]
    assert len(ids(table)) == 25


def test_killed_download_asks_only_for_what_is_missing(tmp_path):
    script = (
        "import sys; from castbench import cli; from castbench.materials import materials_project;"
        "materials_project.PAGE = 10; sys.exit(cli.main(sys.argv[1:]))"
    )
    settings = json.dumps({"source": "materials_project", "descriptions": True})
    folder = tmp_path / "killed"
    options = ["--settings", settings, "--output", folder / "collected.parquet"]
    options += ["--manifest", folder / "manifest.json", "--log", tmp_path / "log.txt"]
    command = [sys.executable, "-c", script, "collect_materials", *map(str, options)]
    with MaterialsProject(salts(45), {"mp-101": "Salt."}) as server:
        environment = {**os.environ, "MP_API_KEY": KEY, "MP_API_ENDPOINT": server.url}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        stuck = Fault("slow", page=4, seconds=60)
        server.faults.append(stuck)
        started = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        while stuck.times and time.monotonic() < deadline:
            time.sleep(0.02)
        started.kill()  # SIGKILL
        assert started.wait() == -9
        assert server.pages() == [1, 2, 3]
        server.log.clear()
        subprocess.run(command, env=environment, check=True)
        assert server.pages() == [4, 5]
    assert ids(pq.read_table(folder / "collected.parquet")) == [f"mp-{i}" for i in range(101, 146)]
    assert not (folder / "pages").exists()
    assert "3 pages are there already, 2 to download" in (tmp_path / "log.txt").read_text()


def test_pages_of_another_query_or_version_and_damaged_ones_are_replaced(serve, run, refused, tmp_path):
    def interrupted(server: MaterialsProject) -> MaterialsProject:
        server.faults.append(Fault("500", page=3, times=3))
        refused()
        server.log.clear()
        return server

    server = interrupted(serve(salts(25)))
    first = tmp_path / "live" / "pages" / "00001.jsonl.zst"
    first.write_bytes(first.read_bytes()[:-20])
    run()
    assert server.pages() == [1, 3]

    server = interrupted(serve(salts(25)))
    run(descriptions=True)
    assert server.pages() == [1, 2, 3]

    server = interrupted(serve(salts(25)))
    server.database_version = "2025.12.01"
    _, manifest = run()
    assert server.pages() == [1, 2, 3]
    assert manifest["download"]["database_version"] == "2025.12.01"

    server = interrupted(serve(salts(25)))
    server.documents.append(salt("mp-100"))  # every page moves on by one
    table, _ = run()
    assert server.pages() == [1, 2, 3]
    assert len(ids(table)) == 26


# What goes wrong, and is refused


def test_no_key(serve, refused, monkeypatch):
    serve(salts(1))
    monkeypatch.delenv("MP_API_KEY")
    monkeypatch.setitem(pymatgen_settings(), "PMG_MAPI_KEY", None)
    message = refused()
    assert "no key for the Materials Project: export MP_API_KEY" in message
    monkeypatch.setitem(pymatgen_settings(), "PMG_MAPI_KEY", KEY)  # the other place of the client
    assert materials_project.connect()


def pymatgen_settings() -> dict[str, Any]:
    from pymatgen.core import SETTINGS

    return SETTINGS


def test_key_of_the_wrong_length(serve, refused, monkeypatch):
    serve(salts(1))
    monkeypatch.setenv("MP_API_KEY", KEY[:20])
    assert "must have 32 characters" in refused()


@pytest.mark.parametrize("status", ["401", "403"])
def test_wrong_key(serve, refused, status):
    server = serve(salts(1), key="another0another0another0another0")
    if status == "401":
        server.faults.append(Fault("401"))
    assert f"refuses the key (status {status})" in refused()
    assert len([1 for path, _, _ in server.log if "summary" in path]) == 1  # not asked again


def test_no_network(serve, refused, monkeypatch):
    server = serve(salts(1))
    server.__exit__()
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        from mp_api.client.core.settings import MAPI_CLIENT_SETTINGS

        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setattr(MAPI_CLIENT_SETTINGS, "ENDPOINT", address)
        message = refused()
    assert "does not answer (heartbeat: " in message
    assert "login node" in message
    assert "materials.snapshot" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
@pytest.mark.parametrize(
    "name", ["pages/00002.jsonl.zst", "snapshot.jsonl.zst", "collected.parquet", "manifest.json"]
)
def test_full_disk(serve, run, refused, tmp_path, name):
    server = serve(salts(25))
    file = tmp_path / "live" / name
    file.parent.mkdir(parents=True)
    file.with_name(f".{file.name}.{os.getpid()}.partial").symlink_to("/dev/full")
    assert f"{file}: cannot be written (no space left on device); make space" in refused()
    left = {path.name for path in (tmp_path / "live").rglob("*") if not path.is_dir()}
    assert file.name not in left
    assert not any(name.endswith(".partial") for name in left)
    assert "00001.jsonl.zst" in left
    server.log.clear()
    table, _ = run()
    assert len(ids(table)) == 25
    assert 1 not in server.pages()


def test_version_that_is_not_served(serve, refused):
    serve(salts(1), database_version="2025.12.01")
    message = refused(database_version="2025.09.25")
    assert "serves database version 2025.12.01, and materials.database_version asks for 2025.09.25" in message


def test_version_that_changes_during_the_download(serve, run, refused):
    server = serve(salts(25))
    server.faults.append(Fault("update", page=2, text="2025.12.01"))
    assert "went from database version 2025.09.25 to 2025.12.01" in refused()
    server.log.clear()
    _, manifest = run()
    assert server.pages() == [1, 2, 3]
    assert manifest["download"]["database_version"] == "2025.12.01"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("structure", ..., "have no field structure any more"),
        ("band_gap", ..., "have no field band_gap any more"),
        ("builder_meta", ..., "have no field builder_meta.license any more"),
        ("shear_modulus", ..., "have no field shear_modulus any more"),
        (
            "bulk_modulus",
            17.0,
            "mp-101: the Materials Project's bulk_modulus is no longer a mapping of voigt",
        ),
        (
            "bulk_modulus",
            {"VRH": 17.0},
            "bulk_modulus is no longer a mapping of voigt, reuss and vrh but {'VRH'",
        ),
        ("energy_per_atom", {"PBE": -3.4}, "energy_per_atom is no longer a number but {'PBE': -3.4}"),
    ],
)
def test_changed_schema_names_the_field(serve, refused, field, value, message):
    documents = [document | {field: value} for document in salts(12)]
    if value is ...:
        for document in documents:
            del document[field]
    server = serve(documents)
    server.licences |= {None}  # where the field is gone, nothing is hidden
    server.find = find_all(server) if field == "builder_meta" else server.find  # type: ignore[method-assign]
    assert message in refused()
    if value is ... and field != "shear_modulus":
        assert server.pages() == [1]  # seen at once


def find_all(server: MaterialsProject) -> Callable[..., list[Document]]:
    """The server's search where documents have no licence to filter by."""
    return lambda path, query: list(server.documents)


def test_refused_field_is_named(serve, refused):
    server = serve(salts(1))
    server.faults.append(Fault("400", page=1, text='{"detail": "shear_modulus is not a valid field"}'))
    message = refused()
    assert "refuses the query (status 400" in message
    assert "shear_modulus" in message


def test_empty_answer(serve, refused):
    serve([])
    assert "has no document for this query" in refused()


def test_archive_of_what_needs_no_download(run, tmp_path):
    with pytest.raises(InputError, match="archives a download"):
        run(archive=tmp_path / "a.jsonl.zst", snapshot="b.jsonl.zst")


# Snapshots


@pytest.fixture
def snapshot(serve, run, tmp_path) -> Path:
    """A good snapshot of 25 documents."""
    serve(salts(25))
    run()
    return tmp_path / "live" / "snapshot.jsonl.zst"


def test_snapshot_is_the_same_bytes_again(snapshot, tmp_path):
    header, documents = read_header(snapshot), list(read_documents(snapshot))
    assert len(documents) == 25
    again = tmp_path / "again.jsonl.zst"
    write_snapshot(again, header, documents)
    assert again.read_bytes() == snapshot.read_bytes()


def test_truncated_snapshot(snapshot, refused):
    content = snapshot.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 20):
        snapshot.write_bytes(content[:kept])
        message = refused(snapshot=str(snapshot), folder="replay")
        assert re.search(r"snapshot.jsonl.zst: (is truncated after \d+ documents|is no snapshot)", message)


def test_snapshot_without_its_last_lines(snapshot, refused):
    lines = zstandard.decompress(snapshot.read_bytes(), 1 << 24).splitlines(keepends=True)
    assert len(lines) == 27

    def written(kept: list[bytes]) -> str:
        snapshot.write_bytes(zstandard.compress(b"".join(kept)))
        return refused(snapshot=str(snapshot), folder="replay")

    assert "is truncated after 25 documents" in written(lines[:-1])
    assert "is truncated after 20 documents" in written(lines[:21])
    assert "is damaged (its documents are not" in written(lines[:5] + lines[6:])
    assert "is damaged (its documents are not" in written(
        [lines[0].replace(b"2025.09", b"2025.10"), *lines[1:]]
    )
    assert "is no snapshot" in written(lines[1:])


def test_damaged_snapshot(snapshot, refused, tmp_path):
    content = snapshot.read_bytes()
    for at in range(8, len(content) - 10, 40):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        snapshot.write_bytes(damaged)
        message = refused(snapshot=str(snapshot), folder="replay")
        assert re.search("is damaged|is truncated|is no snapshot", message)
    assert not (tmp_path / "replay" / "collected.parquet").exists()


def test_what_is_no_snapshot(refused, tmp_path):
    file = tmp_path / "a.jsonl.zst"
    assert "there is no such snapshot" in refused(snapshot=str(file))
    file.write_text('{"material_id": "mp-1"}')
    assert "is no snapshot" in refused(snapshot=str(file))
    file.write_bytes(zstandard.compress(b'{"material_id": "mp-1"}\n'))
    assert "is no snapshot" in refused(snapshot=str(file))


def test_snapshot_of_another_version_or_query(snapshot, refused, tmp_path):
    message = refused(snapshot=str(snapshot), database_version="2025.12.01")
    assert "holds database version 2025.09.25, and materials.database_version asks for 2025.12.01" in message
    assert "another query (lacks description)" in refused(snapshot=str(snapshot), descriptions=True)
    header, documents = read_header(snapshot), list(read_documents(snapshot))
    other = tmp_path / "other.jsonl.zst"
    write_snapshot(other, header | {"query": {"deprecated": False, "elements": ["Si"]}}, documents)
    assert "is the snapshot of another query (was {'deprecated': False, 'elements'" in refused(
        snapshot=str(other)
    )


# The workflow


def test_workflow_downloads_replays_and_keeps_the_key_to_itself(root, tmp_path):
    """Rules, logs, metadata and outputs of a real run with the server as its script; the key is in none."""
    project = tmp_path / "castbench"
    for name in ("workflow", "src", "envs"):
        shutil.copytree(root / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(root / name, project / name)
    overlay = {
        "dataset": "mp",
        "materials": {"source": "materials_project", "database_version": "2025.09.25"},
        "targets": ["total_energy", "log_bulk_modulus"],
    }
    replay = {"dataset": "replay", "materials": {"snapshot": "results/mp/materials/snapshot.jsonl.zst"}}
    (project / "mp.yaml").write_text(yaml.safe_dump(overlay))
    (project / "replay.yaml").write_text(yaml.safe_dump(replay))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MP_", "PMG_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def snakemake(*configfiles: str, **variables: str) -> str:
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            "materials",
            "--configfile",
            *configfiles,
        ]
        ended = subprocess.run(
            command, cwd=project, env=environment | variables, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        (project / f"{configfiles[-1]}.out").write_text(ended.stdout)
        assert ended.returncode == 0, ended.stdout[-4000:]
        return ended.stdout

    server = subprocess.Popen(
        [sys.executable, root / "tests" / "mp_server.py", "--key", KEY, "--first", "60"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        snakemake("mp.yaml", MP_API_KEY=KEY, MP_API_ENDPOINT=address)
    finally:
        server.kill()
        server.wait()
    snakemake("mp.yaml", "replay.yaml")
    live, again = (project / "results" / name / "materials" for name in ("mp", "replay"))
    assert files_of(live) == files_of(again)
    assert json.loads((live / "manifest.json").read_text())["n_kept"] == 60
    assert not (live / "pages").exists()
    secrets = (KEY.encode(), base64.b64encode(KEY.encode())[:40], KEY.encode().hex().encode())
    searched = 0
    for file in project.rglob("*"):
        if not file.is_file():
            continue
        content = file.read_bytes()
        if file.suffix == ".zst":
            content += zstandard.ZstdDecompressor().stream_reader(content).read()
        assert not any(secret in content for secret in secrets), file
        searched += 1
    assert searched > 30
    assert (project / ".snakemake" / "metadata").is_dir()


def test_server_writes_descriptions_as_the_service_does():
    text = (
        "Na2O is Fluorite structured and crystallizes in the cubic Fm-3m space group. Fe(1)3+ is in "
        "Al2(SO4)3. It is triclinic, P-1 space group, or monoclinic, P2_1/c space group, not P1 space group."
    )
    assert to_unicode(text) == (
        "Na₂O is Fluorite structured and crystallizes in the cubic Fm3̅m space group. Fe(1)³⁺ is in "
        "Al₂(SO₄)₃. It is triclinic, P1̅ space group, or monoclinic, P2₁/c space group, not P1 space group."
    )
