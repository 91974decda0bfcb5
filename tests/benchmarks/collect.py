"""Time and peak memory of collect_materials from a snapshot, by number of records, against a table in memory.

    python tests/benchmarks/collect.py [--records 1000 10000 100000]

Records are clones of the bundled crystals with strained lattices, new ids and energies, written as a snapshot
of the Materials Project; every run is a process of its own. The strain lowers the symmetry, so that spglib,
which both use, takes a smaller part of the time than with real crystals. The alternative does the obvious
with pymatgen: all documents into a list of structures, their space groups by SpacegroupAnalyzer, and a pandas
table to Parquet. Seconds are those of the work, after a first run on a few records; memory is the highest
resident size of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from castbench.materials.materials_project import FIELDS, QUERY  # noqa: E402
from castbench.materials.snapshot import write_snapshot  # noqa: E402
from mp_server import DEMO, read_crystals  # noqa: E402

OURS = """
import json
from castbench.materials.sources import collect_materials

def work(snapshot, folder):
    settings = {"source": "materials_project", "snapshot": str(snapshot)}
    collect_materials(settings, folder / "a.parquet", folder / "a.json")
    return json.loads((folder / "a.json").read_text())["n_kept"]
"""
IN_MEMORY = """
import json
import pandas as pd, zstandard
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

def work(snapshot, folder):
    with zstandard.open(snapshot, "rt") as lines:
        documents = [json.loads(line) for line in lines][1:-1]
    structures = [Structure.from_dict(document["structure"]) for document in documents]
    pd.DataFrame(
        {
            "material_id": [document["material_id"] for document in documents],
            "formula": [structure.composition.reduced_formula for structure in structures],
            "structure": [json.dumps(document["structure"]) for document in documents],
            "energy_per_atom": [document["energy_per_atom"] for document in documents],
            "band_gap": [document["band_gap"] for document in documents],
            "k_vrh": [(document["bulk_modulus"] or {}).get("vrh") for document in documents],
            "spacegroup": [SpacegroupAnalyzer(one).get_space_group_number() for one in structures],
        }
    ).to_parquet(folder / "b.parquet")
    return len(documents)
"""
MEASURE = """
import sys, time
from pathlib import Path
from castbench.provenance import peak_rss
warm, snapshot, folder = map(Path, sys.argv[1:])
work(warm, folder)
start = time.perf_counter()
records = work(snapshot, folder)
seconds = time.perf_counter() - start
print(json.dumps([records, seconds, peak_rss()]))
"""


def simulate(count: int) -> Iterator[dict[str, Any]]:
    """Documents like those that the service gives, `count` of them, all different."""
    crystals, _ = read_crystals(DEMO)
    rng = np.random.default_rng(0)
    for i in range(count):
        original = crystals[i % len(crystals)]
        strain = rng.normal(0, 0.02, (3, 3))
        lattice = np.array(original["structure"]["lattice"]["matrix"]) @ (np.eye(3) + strain + strain.T)
        structure = original["structure"] | {"lattice": {"matrix": lattice.tolist()}}
        structure["sites"] = [
            site | {"xyz": (np.array(site["abc"]) @ lattice).tolist()} for site in structure["sites"]
        ]
        yield original | {
            "material_id": f"mp-{i + 1}",
            "structure": structure,
            "energy_per_atom": original["energy_per_atom"] + float(rng.normal(0, 0.01)),
        }


def write(folder: Path, count: int) -> Path:
    """Write a snapshot of simulated documents."""
    path = folder / f"{count}.jsonl.zst"
    header = {"query": QUERY, "fields": list(FIELDS), "database_version": "simulated", "documents": count}
    header |= dict.fromkeys(("client", "endpoint", "downloaded"), "simulated")
    write_snapshot(path, header, simulate(count))
    return path


def measure(script: str, warm: Path, snapshot: Path) -> tuple[int, float, float]:
    """Run a script on a snapshot; returns records, seconds and peak memory in MB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script + MEASURE, warm, snapshot, snapshot.parent],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return tuple(json.loads(ended.stdout))


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    arguments = parser.parse_args()
    counts = sorted(arguments.records)
    few, many = counts[0], counts[-1]
    row = "{:>8} {:14} {:>9} {:>10} {:>8}"
    print(row.format("records", "code", "seconds", "records/s", "peak MB"), flush=True)
    measured: dict[tuple[str, int], tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        warm = write(Path(scratch), 50)
        for count in counts:
            snapshot = write(Path(scratch), count)
            for code, script in (("castbench", OURS), ("pymatgen list", IN_MEMORY)):
                records, seconds, peak = measure(script, warm, snapshot)
                assert records == count
                measured[code, count] = seconds, peak
                rate = f"{count / seconds:.0f}"
                print(row.format(count, code, f"{seconds:.1f}", rate, f"{peak:.0f}"), flush=True)
    for code in ("castbench", "pymatgen list"):
        (few_seconds, few_peak), (many_seconds, many_peak) = measured[code, few], measured[code, many]
        slower = many_seconds / many * few / few_seconds
        print(f"{code}, {many} against {few} records: {many_peak / few_peak:.2f} times the memory,", end=" ")
        print(f"{slower:.2f} times the time a record")
    (ours, our_peak), (theirs, their_peak) = measured["castbench", many], measured["pymatgen list", many]
    what = f"{many} records, pymatgen list against castbench"
    print(f"time {theirs / ours:.1f} (seconds for {what})")
    print(f"ratio {their_peak / our_peak:.1f} (peak memory for {what})")


if __name__ == "__main__":
    main()
