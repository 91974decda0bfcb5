"""How many crystals a second one core turns into graphs, against a named alternative.

    python tests/benchmarks/graphs.py [--crystals 200] [--reference PYTHON]

PYTHON is the interpreter of an environment with the reference (tests/reference/make_cogn_graphs.py says how
to make it). Without it the alternative is the same steps with pymatgen: symmetry by SpacegroupAnalyzer, all
neighbours within 10 angstrom of every atom of the refined cell, then the nearest 24. Times are CPU time of a
single process.
"""

import argparse
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from pymatgen.core import Element, Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from castbench.graphs.neighbours import CrystalGraph, crystal_graph

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS = {"elastic4": 2880, "mp36k": 33124}


def crystals(name: str, n: int) -> list[Structure]:
    """About n crystals, evenly spread over a file of ../shared/data."""
    with zstandard.open(DATA / f"{name}.jsonl.zst", "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 0, None, max(ROWS[name] // n, 1))]
    return [Structure(Lattice.from_parameters(*row["cell"]), row["species"], row["frac"]) for row in rows]


def ours(structure: Structure) -> CrystalGraph:
    """The graph from plain arrays, as they come out of materials.parquet."""
    return crystal_graph(
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


def main() -> None:
    """Print a table and, last, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crystals", type=int, default=200, help="of each file (default 200)")
    parser.add_argument("--reference", help="python of an environment with kgcnn 3.0.0")
    arguments = parser.parse_args()
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
        print(
            f"{name:10} {sites:.1f} sites, {nodes.mean():.2f} +- {nodes.std():.2f} nodes a crystal, "
            f"{edges} edges stored as {merged} ({edges / merged:.2f} times fewer)"
        )
    ratio = np.mean(means[alternative]) / np.mean(means["castbench"])
    print(f"ratio {ratio:.1f} (crystals a second and core, castbench against {alternative})")


if __name__ == "__main__":
    main()
