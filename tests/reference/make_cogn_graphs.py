r"""Record the reference's graphs: python make_cogn_graphs.py < crystals.jsonl > cogn_graphs.jsonl

A line has material_id, lattice, species and frac_coords. To it are added, as multisets that do not depend on
the order of atoms: the space group, nodes [atomic number, multiplicity], and edges [atomic number and
multiplicity of the source, the same of the target, distance in angstrom, how many]. The output can be an
input again. With --time it prints the CPU seconds of each crystal instead.

Runs in an environment of its own (Python 3.11), which pip cannot resolve by itself:

    pip install networkx==3.1 numpy==1.24.3 pandas==2.0.3 scipy==1.11.4 monty==2023.9.25 ruamel.yaml \
        uncertainties palettable tabulate tqdm pybtex plotly requests sympy "matplotlib<3.9" py3Dmol
    pip install --no-deps pymatgen==2023.5.10 kgcnn==3.0.0 pyxtal==0.5.9 spglib==2.0.2
"""

import json
import sys
import time
from collections import Counter
from contextlib import redirect_stdout

from kgcnn.crystal.preprocessor import KNNAsymmetricUnitCell
from pymatgen.core import Structure


def multisets(graph):
    """Space group, nodes and edges of a reference graph, sorted."""
    node = {i: (int(data["atomic_number"]), int(data["multiplicity"])) for i, data in graph.nodes(data=True)}
    edges = Counter(
        (*node[source], *node[target], round(float(distance), 8))
        for source, target, distance in graph.edges(data="distance")
    )
    return {
        "spacegroup": int(graph.spacegroup),
        "nodes": sorted(node.values()),
        "edges": sorted([*edge, count] for edge, count in edges.items()),
    }


def main():
    """One JSON line a crystal."""
    preprocessor = KNNAsymmetricUnitCell(k=24)
    for line in sys.stdin:
        row = json.loads(line)
        structure = Structure(row["lattice"], row["species"], row["frac_coords"])
        start = time.process_time()
        with redirect_stdout(sys.stderr):  # pyxtal prints
            graph = preprocessor(structure)
        seconds = time.process_time() - start
        print(json.dumps(seconds if "--time" in sys.argv else row | multisets(graph)))


if __name__ == "__main__":
    main()
