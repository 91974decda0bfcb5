"""Texts equal those of the unpatched package, byte for byte; an unknown version is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from castbench.errors import InputError
from castbench.text import robocrystallographer
from castbench.text.descriptions import Worker, describe_shard
from real_crystals import DESCRIBED, sample

REFERENCE = Path(__file__).parents[3] / "reference"


@pytest.fixture(scope="module")
def worker():
    with Worker(robocrystallographer.describe, robocrystallographer.prepare, time_limit=300) as worker:
        yield worker


# How many of its sites are inequivalent the last bit decides: on a processor of another make the unpatched
# package says neither what was recorded nor what ours says.
BY_ROUNDING = ("mp-557862",)


def test_two_hundred_real_crystals(shared_data: Path, worker: Worker):
    """What the unpatched package says was recorded by tests/reference/describe_stock.py."""
    with (REFERENCE / "stock_texts.jsonl").open() as lines:
        recorded = {(row["file"], row["material_id"]): row for row in map(json.loads, lines)}
    crystals = sample(shared_data, DESCRIBED)
    assert len(crystals) == len(recorded) > 200
    different = []
    for crystal in crystals:
        key = crystal["file"], crystal["material_id"]
        text, status = worker(crystal["structure"])
        assert status == "ok", key
        if hashlib.sha256(text.encode()).hexdigest() != recorded[key]["sha256"]:
            different.append((key, text))
    assert [row for row in different if row[0][1] not in BY_ROUNDING] == []


def test_the_unpatched_package_beside_ours(shared_data: Path, worker: Worker):
    """Small ones of the same crystals, described now by both: the record is of the installed package."""
    crystals = [row for row in sample(shared_data, DESCRIBED) if row["nsites"] <= 4][::12]
    # Several prototypes match this one: the last rounds of ever smaller tolerances decide.
    crystals += [row for row in sample(shared_data, {"elastic4": 2880}) if row["material_id"] == "mp-556911"]
    assert len(crystals) > 5
    stock = subprocess.run(
        [sys.executable, str(REFERENCE / "describe_stock.py")],
        input="\n".join(map(json.dumps, crystals)), text=True, capture_output=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for crystal, answer in zip(crystals, map(json.loads, stock.stdout.splitlines()), strict=True):
        assert worker(crystal["structure"]) == (answer["text"], "ok"), crystal["material_id"]


def test_memory_does_not_grow_with_crystals(worker: Worker):
    def memory() -> int:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    if not Path("/proc").is_dir():
        pytest.skip("no /proc to read a process's memory from")
    before = 0
    for i in range(80):
        a = 2.5 + 0.01 * i
        structure = {
            "lattice": [0, a, a, a, 0, a, a, a, 0],
            "species": [("Li", "Na", "K")[i % 3], ("F", "Cl", "Br", "I")[i % 4]],
            "frac_coords": [0, 0, 0, 0.5, 0.5, 0.5],
        }
        assert worker(structure)[1] == "ok"
        before = before or (memory() if i == 20 else 0)
    assert memory() - before < 4_000  # kB; a structure kept for each would be ten times that


@pytest.mark.parametrize("package", sorted(robocrystallographer.COMPARED))
def test_a_version_that_was_not_compared_is_refused(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    compared = robocrystallographer.COMPARED[package]
    monkeypatch.setitem(robocrystallographer.COMPARED, package, "0.0.1")
    with pytest.raises(InputError) as error:
        describe_shard({"source": "generate", "time_limit": 1, "shards": 1}, tmp_path, 0, tmp_path / "0")
    assert str(error.value).startswith(f"{package} {compared}: its descriptions were not compared with ours")
    assert "install 0.0.1" in str(error.value)


def test_a_random_hash_seed_is_refused():
    if not sys.flags.hash_randomization:
        pytest.skip("this Python has a fixed hash seed")
    with pytest.raises(RuntimeError, match="PYTHONHASHSEED=0"):
        robocrystallographer.prepare()
