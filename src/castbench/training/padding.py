"""Padded batches, made on the device that holds all crystals, without the host having to wait for it.

Behind the crystals of a batch stands one that is none: where `Batch` does not say what its values are, they
are those of the first row of all. There are two ways to the same bits: Triton kernels (kernels/batches.py),
one for graphs and one for tokens, and torch operations, some dozens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from castbench import kernels
from castbench.models.messages import segment_sums


class Graphs(NamedTuple):
    """Packed graphs of all crystals G, with n nodes and e edges, on one device."""

    node_offsets: Tensor  # (G + 1,) int64
    edge_offsets: Tensor  # (G + 1,) int64
    atomic_numbers: Tensor  # (n,) uint8
    multiplicities: Tensor  # (n,) float32
    shares: Tensor  # (n,) float32, of the crystal's atoms
    # Numbers below are those of nodes and edges within their crystal, int32.
    edge_starts: Tensor  # (n,) of the first edge into a node or a later one
    source_starts: Tensor  # (n,) the same of edges out of a node, in `source_order`
    edge_source: Tensor  # (e,)
    edge_target: Tensor  # (e,) ascending
    source_order: Tensor  # (e,) edges sorted by source
    distances: Tensor  # (e,) float32
    edge_multiplicities: Tensor  # (e,) float32

    @classmethod
    def of(
        cls, node_offsets: Tensor, edge_offsets: Tensor, nodes: dict[str, Tensor], edges: dict[str, Tensor]
    ) -> Graphs:
        """The graphs with those offsets and arrays, which are named as in `PackedGraphs`."""
        crystal, nodes_of = (torch.repeat_interleave(part.diff()) for part in (edge_offsets, node_offsets))
        source, target = (node_offsets[crystal] + edges[f"edge_{end}"] for end in ("source", "target"))
        multiplicities = nodes["multiplicities"]
        atoms = segment_sums(multiplicities[:, None], node_offsets).squeeze(1)

        def starts(ends: Tensor) -> Tensor:
            degrees = ends.bincount(minlength=len(multiplicities))
            return (degrees.cumsum(0) - degrees - edge_offsets[nodes_of]).int()

        return cls(
            node_offsets,
            edge_offsets,
            nodes["atomic_numbers"],
            multiplicities,
            shares=multiplicities / atoms[nodes_of],
            edge_starts=starts(target),
            source_starts=starts(source),
            source_order=(source.argsort(stable=True) - edge_offsets[crystal]).int(),
            edge_source=edges["edge_source"],
            edge_target=edges["edge_target"],
            distances=edges["distances"],
            edge_multiplicities=edges["edge_multiplicities"],
        )


def padded_graphs(graphs: Graphs, rows: Tensor, nodes: int, edges: int) -> dict[str, Tensor]:
    """Parts of a `Batch` of the crystals `rows` (B,), padded to as many nodes and edges."""
    if kernels.usable("batches", rows.device):
        from castbench.kernels import batches

        return batches.graphs(graphs, rows, nodes, edges)
    return plain_graphs(graphs, rows, nodes, edges)


def padded_tokens(offsets: Tensor, states: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Offsets (B + 2,) and states (size, d), or ids (size,), of the tokens of the crystals `rows` (B,).

    Args:
        offsets: (G + 1,) of all crystals.
        states: (T, d) of all tokens, or ids (T,).
        rows: of the batch.
        size: tokens in all.
    """
    if kernels.usable("batches", rows.device):
        from castbench.kernels import batches

        return batches.tokens(offsets, states, rows, size)
    return plain_tokens(offsets, states, rows, size)


def plain_graphs(graphs: Graphs, rows: Tensor, nodes: int, edges: int) -> dict[str, Tensor]:
    """`padded_graphs` by torch."""
    node_offsets, of_node, node = _places(graphs.node_offsets, rows, nodes)
    edge_offsets, of_edge, edge = _places(graphs.edge_offsets, rows, edges)
    none_node, none_edge = of_node == len(rows), of_edge == len(rows)
    first_edge, first_node = edge_offsets[of_node], node_offsets[of_edge]
    in_all = edge_offsets[-2:-1]  # edges of the crystals

    def of_nodes(values: Tensor) -> Tensor:
        return values.index_select(0, node).masked_fill(none_node, 0)

    def of_edges(values: Tensor) -> Tensor:
        return values.index_select(0, edge).masked_fill(none_edge, 0)

    return {
        "node_offsets": node_offsets,
        "atomic_numbers": graphs.atomic_numbers.index_select(0, node).long(),
        "multiplicities": of_nodes(graphs.multiplicities),
        "shares": of_nodes(graphs.shares),
        "edge_starts": torch.cat([first_edge + of_nodes(graphs.edge_starts), in_all]),
        "source_starts": torch.cat([first_edge + of_nodes(graphs.source_starts), in_all]),
        "edge_source": first_node + of_edges(graphs.edge_source),
        "edge_target": first_node + of_edges(graphs.edge_target),
        "source_order": edge_offsets[of_edge] + of_edges(graphs.source_order),
        "distances": graphs.distances.index_select(0, edge),
        "edge_multiplicities": of_edges(graphs.edge_multiplicities),
    }


def plain_tokens(offsets: Tensor, states: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`padded_tokens` by torch."""
    own, _, places = _places(offsets, rows, size)
    return own, states.index_select(0, places)


def _places(offsets: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (B + 2,); of each of `size` values, its crystal's place in `rows` and its own in the arrays."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    ends = lengths.cumsum(0)
    places = torch.arange(size, device=rows.device)
    owner = torch.searchsorted(ends, places, right=True)
    shift = functional.pad(starts - ends + lengths, (0, 1))
    index = (places + shift[owner]).masked_fill(owner == len(rows), 0)
    return torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), size)]), owner, index
