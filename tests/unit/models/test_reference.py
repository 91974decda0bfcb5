"""The outputs of the reference with the same weights, recorded by tests/reference/make_cogn_outputs.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from pymatgen.core import Element

from castbench.graphs.kinds import structure_graph
from castbench.models.structure import StructureOnly
from model_batches import batch_of
from reference.fixed_weights import fixed_facts, fixed_weights

FOLDER = Path(__file__).parents[2] / "reference"
OUTPUTS = json.loads((FOLDER / "cogn_outputs.json").read_text())
with zstandard.open(FOLDER / "cogn_graphs.jsonl.zst", "rt") as lines:
    CRYSTALS = {row["material_id"]: row for row in map(json.loads, lines)}
LONE = "a cluster and a lone atom"  # to which the reference gives edges thrice


def graph_of(row, **settings):
    numbers = np.array([Element(symbol).Z for symbol in row["species"]])
    return structure_graph(np.array(row["lattice"]), np.array(row["frac_coords"]), numbers, settings)


def set_weights(model):
    """The weights of the recorded run.

    Keras keeps matrices transposed, embeddings excepted; the gates of its GRU have the order update, reset,
    new, PyTorch's reset, update, new, and its two biases are one array.
    """
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if not name.endswith("gate.bias_hh")]
    shapes = [tuple(parameters[name].shape)[::-1] for name in names]
    shapes[0] = shapes[0][::-1]
    shapes = [
        (2, *shape) if name.endswith("gate.bias_ih") else shape
        for name, shape in zip(names, shapes, strict=True)
    ]
    with torch.no_grad():
        for name, values in zip(names, map(torch.from_numpy, fixed_weights(shapes)), strict=True):
            if ".gate." in name:
                update, reset, new = values.chunk(3, dim=-1)
                values = torch.cat([reset, update, new], dim=-1)
            if name.endswith("gate.bias_ih"):
                parameters[name].copy_(values[0])
                parameters[name.replace("_ih", "_hh")].copy_(values[1])
            else:
                parameters[name].copy_(values if "embedding" in name or values.ndim == 1 else values.T)


@pytest.fixture(scope="module", params=["cogn", "congn"])
def model(request):
    sizes = {"cogn": {"width": 128, "depth": 5}, "congn": {"width": 160, "depth": 5}}
    model = StructureOnly({request.param: sizes[request.param]}).eval()
    assert sum(p.numel() for p in model.parameters()) == OUTPUTS[request.param]["parameters"]
    set_weights(model)
    model.structure.node_input.facts.copy_(torch.from_numpy(fixed_facts()))
    return model


def predict(model, name):
    settings = {"structure_encoder": model.structure.name, "neighbours": 24, "symprec": 1e-4}
    with torch.inference_mode():
        return float(model(batch_of(graph_of(CRYSTALS[name], **settings))))


@pytest.mark.parametrize("name", sorted(CRYSTALS.keys() - {LONE}))
def test_predictions_are_those_of_the_reference(model, name):
    expected = OUTPUTS[model.structure.name][name]
    assert predict(model, name) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_cogn_differs_where_the_reference_adds_edges_again(model):
    if model.structure.name == "cogn":
        assert abs(predict(model, LONE) - OUTPUTS["cogn"][LONE]) > 0.1
