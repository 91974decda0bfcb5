"""Files are whole or absent, and hashes say what they are made from."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from castbench import provenance
from castbench.errors import InputError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), provenance.atomic_path(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_file_and_name_are_synced_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renaming(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", renaming)
    provenance.write_json(tmp_path / "a.json", {"a": 1})
    assert done == ["file", "name", "folder"]


def test_a_file_system_that_syncs_no_folders_is_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    provenance.sync_folder(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path):
    file = tmp_path / "a.json"
    file.with_name(f".{file.name}.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"a.json: cannot be written \(no space left on device\)"):
        provenance.write_json(file, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_json_is_canonical_and_refuses_nan(tmp_path: Path):
    file = tmp_path / "new" / "a.json"
    provenance.write_json(file, {"b": 1, "a": [None, "Å"]})
    assert file.read_text() == '{\n "a": [\n  null,\n  "Å"\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError):
        provenance.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text())["b"] == 1


def test_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    child = "from castbench.provenance import peak_rss; print(peak_rss())"
    parent = (
        "import subprocess, sys; held = bytearray(b'1' * 2**28);"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    path = os.environ | {"PYTHONPATH": str(Path(provenance.__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", parent], env=path, check=True, capture_output=True, text=True
    )
    assert 5 < float(found.stdout) < 200


def test_hashes(tmp_path: Path):
    file = tmp_path / "a"
    file.write_bytes(b"crystal" * 100_000)
    assert provenance.sha256_file(file) == hashlib.sha256(b"crystal" * 100_000).hexdigest()
    assert provenance.sha256_json({"a": 1, "b": 2}) == provenance.sha256_json({"b": 2, "a": 1})
    assert provenance.sha256_json({"a": 1}) != provenance.sha256_json({"a": 2})


def test_records_name_versions_and_hardware():
    assert {"python", "torch", "pymatgen"} <= set(provenance.package_versions())
    assert provenance.hardware()["cores"] >= 1
