"""Record the reference's outputs: python make_cogn_outputs.py < crystals.jsonl > cogn_outputs.json

Crystals are those of cogn_graphs.jsonl.zst. The output has, of coGN and coNGN, the number of parameters and
the prediction for each crystal with the weights and element facts of fixed_weights.py. (The PyPI package
lacks its periodic table, so facts of some kind have to be given to it.)

coNGN's reference leaves out the angles between two neighbours that are copies of one atom: in its molecular
code that is one bond, in a crystal it is not. Here it is told to take all pairs of bonds to an atom.

Runs in the environment of make_cogn_graphs.py with TensorFlow besides:

    pip install tensorflow-cpu==2.13.1 numpy==1.24.3 typeguard==2.13.3
    pip install --no-deps tensorflow-addons==0.21.0
"""

import json
import sys
from contextlib import redirect_stdout

import kgcnn.literature.coGN._make as reference
import numpy as np
import tensorflow as tf
from fixed_weights import fixed_facts, fixed_weights
from kgcnn.crystal.preprocessor import KNNAsymmetricUnitCell, VoronoiAsymmetricUnitCell
from kgcnn.graph.methods import get_angle_indices
from kgcnn.literature.coGN import model_default, model_default_nested
from pymatgen.core import Structure

KINDS = {
    "cogn": (KNNAsymmetricUnitCell(k=24), model_default),
    "congn": (VoronoiAsymmetricUnitCell(1e-6), model_default_nested),
}


class FixedTable:
    """Stands for the reference's periodic table."""

    columns = ("get_atomic_mass", "get_atomic_radius", "get_electronegativity", "get_ionization_energy")

    def __getattr__(self, name):
        facts = fixed_facts()
        column = facts[:, 4:] if name == "get_oxidation_states" else facts[:, self.columns.index(name)]
        return lambda: column.tolist()


def inputs_of(graph):
    """What the model may read of a reference graph, by the names of its inputs."""
    edges = list(graph.edges(data=True))
    ends = np.array([(source, target) for source, target, _ in edges])
    found = {
        "edge_indices": ends[:, ::-1],
        "offset": np.array([data["offset"] for *_, data in edges], dtype=np.float32),
        "atomic_number": np.array([z for _, z in graph.nodes(data="atomic_number")]),
        "multiplicity": np.array([n for _, n in graph.nodes(data="multiplicity")]),
    }
    if "voronoi_ridge_area" in edges[0][2]:
        areas = [data["voronoi_ridge_area"] for *_, data in edges]
        found["voronoi_ridge_area"] = np.array(areas, dtype=np.float32)
        pairs = get_angle_indices(ends, allow_multi_edges=True, allow_reverse_edges=True, edge_pairing="kj")
        found["line_graph_edge_indices"] = pairs[2]
    return found


def main():
    """One JSON object."""
    reference.PeriodicTable = FixedTable
    structures = {}
    for line in sys.stdin:
        row = json.loads(line)
        structures[row["material_id"]] = Structure(row["lattice"], row["species"], row["frac_coords"])
    outputs = {}
    for name, (preprocessor, settings) in KINDS.items():
        with redirect_stdout(sys.stderr):  # both print
            model = reference.make_model(**settings)
            graphs = {key: preprocessor(structure) for key, structure in structures.items()}
        model.set_weights(fixed_weights([weight.shape for weight in model.get_weights()]))
        outputs[name] = {"parameters": model.count_params()}
        for key, graph in graphs.items():
            found = inputs_of(graph)
            values = [
                tf.RaggedTensor.from_row_lengths(found[x.name], [len(found[x.name])]) for x in model.inputs
            ]
            outputs[name][key] = float(model(values)[0, 0])
    json.dump(outputs, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
