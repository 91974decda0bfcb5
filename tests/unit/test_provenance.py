"""Files are whole or absent, and hashes say what they are made from."""

import hashlib
import json
from pathlib import Path

import pytest

from castbench import provenance


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), provenance.atomic_path(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_canonical_and_refuses_nan(tmp_path: Path):
    file = tmp_path / "new" / "a.json"
    provenance.write_json(file, {"b": 1, "a": [None, "Å"]})
    assert file.read_text() == '{\n "a": [\n  null,\n  "Å"\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError):
        provenance.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text())["b"] == 1


def test_hashes(tmp_path: Path):
    file = tmp_path / "a"
    file.write_bytes(b"crystal" * 100_000)
    assert provenance.sha256_file(file) == hashlib.sha256(b"crystal" * 100_000).hexdigest()
    assert provenance.sha256_json({"a": 1, "b": 2}) == provenance.sha256_json({"b": 2, "a": 1})
    assert provenance.sha256_json({"a": 1}) != provenance.sha256_json({"a": 2})


def test_records_name_versions_and_hardware():
    assert {"python", "torch", "pymatgen"} <= set(provenance.package_versions())
    assert provenance.hardware()["cores"] >= 1
