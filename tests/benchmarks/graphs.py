"""How many crystals a second one core turns into graphs, against a named alternative.

    python tests/benchmarks/graphs.py [--crystals 200] [--reference PYTHON] [--simulated 1000 100000]

PYTHON is the interpreter of an environment with the reference (tests/reference/make_cogn_graphs.py says how
to make it). Without it the alternative is the same steps with pymatgen: symmetry by SpacegroupAnalyzer, all
neighbours within 10 angstrom of every atom of the refined cell, then the nearest 24. Times are CPU time of a
single process. `--simulated` builds the graphs of so many clones of the bundled crystals with strained
lattices, each number in a process of its own, and prints its peak memory.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pymatgen.core import Element, Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from castbench.graphs.build import CHUNK  # noqa: E402
from castbench.graphs.crystal_graph import CrystalGraph  # noqa: E402
from castbench.graphs.packed import EDGE_ARRAYS, NODE_ARRAYS  # noqa: E402
from crystals import cogn_graph  # noqa: E402
from mp_server import DEMO, read_crystals  # noqa: E402

KEPT = NODE_ARRAYS | EDGE_ARRAYS
DATA = ROOT.parent / "shared" / "data"
ROWS = {"elastic4": 2880, "mp36k": 33124}


def crystals(name: str, n: int) -> list[Structure]:
    """About n crystals, evenly spread over a file of ../shared/data."""
    with zstandard.open(DATA / f"{name}.jsonl.zst", "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 0, None, max(ROWS[name] // n, 1))]
    return [Structure(Lattice.from_parameters(*row["cell"]), row["species"], row["frac"]) for row in rows]


def ours(structure: Structure) -> CrystalGraph:
    """The graph from plain arrays, as they come out of materials.parquet."""
    return cogn_graph(
        structure.lattice.matrix,
        structure.frac_coords,
        np.array([Element(s.name).Z for s in structure.species]),
    )


def with_pymatgen(structure: Structure) -> int:
    """Edges of the asymmetric unit, found as the reference finds them, with pymatgen alone."""
    analyzer = SpacegroupAnalyzer(structure, symprec=1e-4)
    refined = analyzer.get_refined_structure()
    orbits = SpacegroupAnalyzer(refined, symprec=1e-4).get_symmetry_dataset().equivalent_atoms
    radius = 10.0
    while True:
        centre, _, _, distance = refined.get_neighbor_list(radius)
        counts = np.bincount(centre, minlength=len(refined))
        if counts.min() >= 24:
            break
        radius *= 2
    edges = 0
    for i in np.unique(orbits):
        near = np.sort(distance[centre == i])
        edges += int((near <= near[23] + 1e-9).sum())
    return edges


def seconds_each(function: Callable[[Structure], object], structures: list[Structure]) -> np.ndarray:
    """CPU seconds of `function` for each structure."""
    times = []
    for structure in structures:
        start = time.process_time()
        function(structure)
        times.append(time.process_time() - start)
    return np.array(times)


def with_reference(python: str, structures: list[Structure]) -> np.ndarray:
    """CPU seconds of the reference preprocessor for each structure."""
    script = ROOT / "tests" / "reference" / "make_cogn_graphs.py"
    rows = [
        json.dumps(
            {
                "lattice": structure.lattice.matrix.tolist(),
                "species": [s.name for s in structure.species],
                "frac_coords": structure.frac_coords.tolist(),
            }
        )
        for structure in structures
    ]
    answer = subprocess.run(
        [python, str(script), "--time"], input="\n".join(rows), capture_output=True, text=True, check=True
    )
    return np.array([float(line) for line in answer.stdout.splitlines()])


def simulate(folder: Path, count: int) -> Path:
    """Write materials.parquet with `count` strained clones of the bundled crystals."""
    bundled, _ = read_crystals(DEMO)
    rng = np.random.default_rng(0)
    path = folder / f"{count}.parquet"
    kinds = {"lattice": pa.list_(pa.float64()), "species": pa.list_(pa.string())}
    kinds["frac_coords"] = pa.list_(pa.float64())
    schema = pa.schema([("material_id", pa.string()), ("structure", pa.struct(kinds))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, CHUNK):
            rows = []
            for number in range(start, min(start + CHUNK, count)):
                crystal = bundled[number % len(bundled)]["structure"]
                strain = rng.normal(0, 0.02, (3, 3))
                lattice = np.array(crystal["lattice"]["matrix"]) @ (np.eye(3) + strain + strain.T)
                structure = {
                    "lattice": lattice.ravel().tolist(),
                    "species": [site["species"][0]["element"] for site in crystal["sites"]],
                    "frac_coords": np.ravel([site["abc"] for site in crystal["sites"]]).tolist(),
                }
                rows.append({"material_id": f"s-{number}", "structure": structure})
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return path


BUILD = """
import json, sys, time
from pathlib import Path
from castbench.graphs.build import build_graphs
from castbench.graphs.packed import PackedGraphs
from castbench.provenance import peak_rss
settings = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4}
folder = Path(sys.argv[2])
start = time.process_time()
build_graphs(settings, Path(sys.argv[1]), folder, 1)
seconds = time.process_time() - start
manifest = PackedGraphs.open(folder).manifest
size = sum(file["bytes"] for file in manifest["files"].values())
print(json.dumps([seconds, peak_rss(), manifest["n_failed"], size]))
"""


def build_simulated(counts: list[int]) -> None:
    """Print time, peak memory and size of the graphs of simulated crystals."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            materials, folder = simulate(Path(scratch), count), str(Path(scratch) / f"graphs{count}")
            ended = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", BUILD, materials, folder],
                env=environment, check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            seconds, peak, failed, size = json.loads(ended.stdout)
            print(
                f"{count} simulated crystals: {seconds:.0f} s of CPU, peak {peak:.0f} MB, {failed} failed, "
                f"{size / count:.0f} bytes a crystal",
                flush=True,
            )


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crystals", type=int, default=200, help="of each file (default 200)")
    parser.add_argument("--reference", help="python of an environment with kgcnn 3.0.0")
    parser.add_argument("--simulated", type=int, nargs="*", default=[], help="numbers of simulated crystals")
    arguments = parser.parse_args()
    build_simulated(arguments.simulated)
    alternative = "kgcnn 3.0.0" if arguments.reference else "pymatgen"
    columns = "{:10} {:>5} {:12} {:>10} {:>8} {:>8} {:>11}"
    print(columns.format("crystals", "n", "code", "median ms", "mean ms", "max ms", "per second"))
    means = {"castbench": [], alternative: []}
    for name in ROWS:
        structures = crystals(name, arguments.crystals)
        graphs = [ours(structure) for structure in structures]  # also warms up
        times = {"castbench": seconds_each(ours, structures)}
        if arguments.reference:
            times[alternative] = with_reference(arguments.reference, structures)
        else:
            times[alternative] = seconds_each(with_pymatgen, structures)
        for code, seconds in times.items():
            means[code].append(seconds.mean())
            figures = (f"{1e3 * x:.2f}" for x in (np.median(seconds), seconds.mean(), seconds.max()))
            print(columns.format(name, len(seconds), code, *figures, f"{1 / seconds.mean():.0f}"))
        merged = sum(len(graph.distances) for graph in graphs)
        edges = int(sum(graph.edge_multiplicities.sum() for graph in graphs))
        nodes = np.array([len(graph.atomic_numbers) for graph in graphs])
        sites = np.mean([len(structure) for structure in structures])
        kept = (getattr(graph, array).astype(kind) for graph in graphs for array, kind in KEPT.items())
        size = sum(array.nbytes for array in kept) / len(graphs) + 16  # and two offsets
        print(f"{name:10} {size:.0f} bytes a crystal; the paper's 114,398: {114_398 * size / 1e9:.2f} GB")
        print(
            f"{name:10} {sites:.1f} sites, {nodes.mean():.2f} +- {nodes.std():.2f} nodes a crystal, "
            f"{edges} edges stored as {merged} ({edges / merged:.2f} times fewer)"
        )
    ratio = np.mean(means[alternative]) / np.mean(means["castbench"])
    print(f"ratio {ratio:.1f} (crystals a second and core, castbench against {alternative})")


if __name__ == "__main__":
    main()
