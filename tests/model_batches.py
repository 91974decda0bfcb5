"""Batches put together and taken apart, for the tests of the models."""

from dataclasses import replace

import torch

from castbench.models.batch import Batch

EDGE_PARTS = ("distances", "edge_multiplicities", "vectors", "edge_reverse", "ridge_areas")


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
    parts += ("token_ids", "token_states", "targets", "masked_nodes")
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
    drop |= {"token_ids", "token_states"} - set(needs)
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
