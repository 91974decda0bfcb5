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


def test_seconds_of_child_processes_are_counted(tmp_path: Path):
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    with provenance.measured(tmp_path / "cost.json"):
        subprocess.run([sys.executable, "-c", busy], check=True)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["cpu_seconds"] >= 0.29 and cost["seconds"] >= 0.29


def test_the_commit_says_whether_the_tree_has_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "code.py"
    monkeypatch.setattr(provenance, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    version = provenance.code_version.__wrapped__
    assert version() == "unknown"
    file.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "code.py"], [*who, "commit", "-q", "-m", "1"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = version()
    assert len(commit) == 12 and set(commit) <= set("0123456789abcdef")
    file.write_text("2")
    assert version() == f"{commit}-dirty"


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="input/output error"):
        provenance.sync_folder(tmp_path)
    with pytest.raises(OSError, match="input/output error"):
        provenance.write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_a_quota_is_one_line(tmp_path: Path, number: int):
    with pytest.raises(InputError, match=r"a.json: cannot be written .*make space and start again"):
        with provenance.atomic_path(tmp_path / "a.json"):
            raise OSError(number, "no more")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path):
    for name in (".a.json.1.partial", "a.json"):
        (tmp_path / name).touch()
    with provenance.alone_in(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
