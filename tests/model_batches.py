"""Batches put together and taken apart, for the tests of the models."""

from dataclasses import replace

import numpy as np
import torch

from castbench.config import STRUCTURE_ENCODERS
from castbench.graphs.kinds import KINDS, structure_graph
from castbench.graphs.neighbours import unit_of
from castbench.graphs.reciprocal import every_atom
from castbench.models.batch import Batch
from castbench.models.structure import WeightedBatchNorm

EDGE_PARTS = ("distances", "edge_multiplicities", "vectors", "edge_reverse", "ridge_areas")

SYMPREC = 1e-4
SMALL_ENCODERS = {
    "cogn": {"width": 16, "depth": 3},
    "congn": {"width": 16, "depth": 2},
    "alignn": {"width": 16, "embedding": 8, "alignn_layers": 2, "gcn_layers": 2},
    "cgcnn": {"width": 12, "layers": 3, "hidden": 20},  # another width than the fusion's, like the next
    "megnet": {"width": 12, "hidden": 16, "blocks": 3, "vector": 8, "passes": 3},
}


def join(crystals):
    """One batch of several; parts that they lack, it lacks."""
    absent = [name for name in Batch.__slots__ if getattr(crystals[0], name) is None]
    empty = {
        name: torch.zeros(2, dtype=torch.long) if "offsets" in name else torch.zeros(0) for name in absent
    }
    crystals = [replace(crystal, **empty) for crystal in crystals]
    first = torch.tensor([0, *(len(c.atomic_numbers) for c in crystals)]).cumsum(0)
    first_edge = torch.tensor([0, *(len(c.distances) for c in crystals)]).cumsum(0)

    def packed(name):
        return torch.cat([getattr(c, name) for c in crystals])

    def offsets(name):
        return torch.tensor([0, *(int(getattr(c, name)[-1]) for c in crystals)]).cumsum(0)

    parts = ("atomic_numbers", "multiplicities", "distances", "edge_multiplicities", "vectors", "ridge_areas")
    parts += ("token_ids", "token_states", "cls_states", "targets", "masked_nodes")
    joined = Batch(
        n=len(crystals),
        node_offsets=offsets("node_offsets"),
        token_offsets=offsets("token_offsets"),
        edge_source=torch.cat([c.edge_source + at for c, at in zip(crystals, first, strict=False)]),
        edge_target=torch.cat([c.edge_target + at for c, at in zip(crystals, first, strict=False)]),
        edge_reverse=torch.cat([c.edge_reverse + at for c, at in zip(crystals, first_edge, strict=False)]),
        **{name: packed(name) for name in parts},
    )
    return replace(joined, **dict.fromkeys(absent))


def only(batch, needs):
    """The batch as the loader gives it to a model: without the parts that it does not declare."""
    graph = ("atomic_numbers", "multiplicities", "node_offsets", "edge_source", "edge_target")
    graph += (*EDGE_PARTS, "masked_nodes")
    drop = set() if "graph" in needs else set(graph)
    drop |= {"token_ids", "token_states", "cls_states"} - set(needs)
    if not needs & {"token_ids", "token_states"}:
        drop.add("token_offsets")
    return replace(batch, **dict.fromkeys(drop))


def batch_of(graph):
    """A crystal's graph as a batch of one."""
    whole = {"edge_source", "edge_target", "edge_reverse"}
    arrays = {}
    for name in (*EDGE_PARTS, "multiplicities", "edge_source", "edge_target"):
        array = getattr(graph, name)
        if array is not None:
            arrays[name] = torch.from_numpy(array).long() if name in whole else torch.from_numpy(array)
    numbers = torch.from_numpy(graph.atomic_numbers).long()
    return Batch(1, numbers, node_offsets=torch.tensor([0, len(numbers)]), **arrays)


def settings_of(name):
    """Settings of the graphs that an encoder reads, as published."""
    return {"structure_encoder": name, "symprec": SYMPREC, "neighbours": STRUCTURE_ENCODERS[name]}


def graph_batch(name, structure):
    """The graph of a crystal for an encoder, in double precision."""
    numbers = np.array(structure.atomic_numbers)
    graph = structure_graph(structure.lattice.matrix, structure.frac_coords, numbers, settings_of(name))
    return doubled(batch_of(graph))


def doubled(batch):
    """The batch in double precision."""
    parts = ("multiplicities", "distances", "edge_multiplicities", "vectors", "ridge_areas")
    kept = {part: value.double() for part in parts if (value := getattr(batch, part)) is not None}
    return replace(batch, **kept)


def cell_batch(name, structure):
    """The graph in which every atom of the conventional cell is a node by itself."""
    numbers = np.array(structure.atomic_numbers)
    unit = unit_of(structure.lattice.matrix, structure.frac_coords, numbers, SYMPREC)
    graph = KINDS[name].build(every_atom(unit), settings_of(name))
    graph = replace(graph, multiplicities=graph.multiplicities / np.float32(unit.centring))
    return doubled(batch_of(graph))


def normalise_part(rank, address, rows, weights, results) -> None:
    """Normalise a part of a batch in a process of its own: values, gradient and running statistics."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    norm, part = WeightedBatchNorm(4), slice(4 * rank, 4 + 4 * rank)
    own = rows[part].clone().requires_grad_()
    out = norm(own, weights[part])
    out.pow(3).sum().backward()
    results[rank] = [x.detach().tolist() for x in (out, own.grad, norm.running_mean, norm.running_var)]
    torch.distributed.destroy_process_group()
