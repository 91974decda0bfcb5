"""The outputs of the reference with the same weights, recorded by tests/reference/make_cogn_outputs.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from pymatgen.core import Element

from castbench.graphs.kinds import structure_graph
from castbench.models.cogn import StructureOnly
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
    """The weights of the recorded run; Keras keeps matrices transposed, embeddings excepted."""
    parameters = list(model.parameters())
    shapes = [parameters[0].shape, *(tuple(p.shape)[::-1] for p in parameters[1:])]
    embedding, *others = fixed_weights(shapes)
    with torch.no_grad():
        parameters[0].copy_(torch.from_numpy(embedding))
        for parameter, values in zip(parameters[1:], others, strict=True):
            parameter.copy_(torch.from_numpy(values.T))


@pytest.fixture(scope="module")
def cogn():
    model = StructureOnly({"cogn": {"width": 128, "depth": 5}}).eval()
    assert sum(p.numel() for p in model.parameters()) == OUTPUTS["cogn"]["parameters"]
    set_weights(model)
    model.cogn.facts.copy_(torch.from_numpy(fixed_facts()))
    return model


@pytest.mark.parametrize("name", sorted(CRYSTALS.keys() - {LONE}))
def test_cogn_predicts_what_the_reference_does(cogn, name):
    graph = graph_of(CRYSTALS[name], structure_encoder="cogn", neighbours=24, symprec=1e-4)
    with torch.inference_mode():
        predicted = float(cogn(batch_of(graph)))
    assert predicted == pytest.approx(OUTPUTS["cogn"][name], rel=1e-5, abs=1e-5)


def test_cogn_differs_where_the_reference_adds_edges_again(cogn):
    graph = graph_of(CRYSTALS[LONE], structure_encoder="cogn", neighbours=24, symprec=1e-4)
    with torch.inference_mode():
        assert abs(float(cogn(batch_of(graph))) - OUTPUTS["cogn"][LONE]) > 0.1
