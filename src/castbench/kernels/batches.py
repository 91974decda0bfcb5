"""Padded batches (training/padding.py): one kernel for graphs and one for tokens.

A program copies every few blocks of a crystal's values, or of what pads. Where they go it finds by adding up
the lengths of all crystals before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from castbench.training.padding import Graphs, plain_graphs, plain_tokens

PIECES = 4  # programs that share a crystal's edges
BLOCK = 256  # nodes or edges that a program copies at a time
TOKEN_PIECES, TOKEN_BLOCK = 16, 8192  # the same of tokens; of these, numbers in their states
PADDING = 4  # crystals for each program of what pads: it is a quarter of the batch at most, mostly


@triton.jit
def _before(rows, offsets, crystal, n_crystals, ROWS: tl.constexpr):
    """Values of the crystals before one, and its own start and length in the arrays: 0 for what pads."""
    places = tl.arange(0, ROWS)
    row = tl.load(rows + places, mask=places < crystal, other=0)
    start = tl.load(offsets + row, mask=places < crystal, other=0)
    end = tl.load(offsets + row + 1, mask=places < crystal, other=0)
    own = tl.load(rows + crystal, mask=crystal < n_crystals, other=0)
    own_start = tl.load(offsets + own, mask=crystal < n_crystals, other=0)
    own_end = tl.load(offsets + own + 1, mask=crystal < n_crystals, other=0)
    return tl.sum((end - start).to(tl.int32)), own_start, (own_end - own_start).to(tl.int32)


@triton.jit(do_not_specialize=["n_crystals", "n_nodes", "n_edges"])
def _graphs(
    # of `Graphs`
    node_offsets,
    edge_offsets,
    atomic_numbers,
    multiplicities,
    shares,
    edge_starts,
    source_starts,
    edge_source,
    edge_target,
    source_order,
    distances,
    edge_multiplicities,
    # of the batch
    rows,
    to_node_offsets,
    to_atomic_numbers,
    to_multiplicities,
    to_shares,
    to_edge_starts,
    to_source_starts,
    to_edge_source,
    to_edge_target,
    to_source_order,
    to_distances,
    to_edge_multiplicities,
    n_crystals,
    n_nodes,
    n_edges,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    crystal = tl.minimum(tl.program_id(0), n_crystals)
    pads = crystal == n_crystals
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    if pads:  # all programs from here on share it
        piece += (tl.program_id(0) - n_crystals) * pieces
        pieces *= tl.num_programs(0) - n_crystals
    first_node, node_start, nodes = _before(rows, node_offsets, crystal, n_crystals, ROWS)
    first_edge, edge_start, edges = _before(rows, edge_offsets, crystal, n_crystals, ROWS)
    if pads:
        nodes = n_nodes - first_node
        edges = n_edges - first_edge
    if piece == 0:
        tl.store(to_node_offsets + crystal, first_node.to(tl.int64))
        if pads:
            tl.store(to_node_offsets + n_crystals + 1, n_nodes.to(tl.int64))
            tl.store(to_edge_starts + n_nodes, first_edge.to(tl.int64))
            tl.store(to_source_starts + n_nodes, first_edge.to(tl.int64))
    for begin in range(piece * BLOCK, nodes, pieces * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < nodes
        known = there & (not pads)
        source = tl.where(pads, 0, node_start + place)
        to = first_node + place
        tl.store(
            to_atomic_numbers + to, tl.load(atomic_numbers + source, mask=there).to(tl.int64), mask=there
        )
        tl.store(to_multiplicities + to, tl.load(multiplicities + source, mask=known, other=0), mask=there)
        tl.store(to_shares + to, tl.load(shares + source, mask=known, other=0), mask=there)
        start = first_edge + tl.load(edge_starts + source, mask=known, other=0)
        tl.store(to_edge_starts + to, start.to(tl.int64), mask=there)
        start = first_edge + tl.load(source_starts + source, mask=known, other=0)
        tl.store(to_source_starts + to, start.to(tl.int64), mask=there)
    for begin in range(piece * BLOCK, edges, pieces * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < edges
        known = there & (not pads)
        source = tl.where(pads, 0, edge_start + place)
        to = first_edge + place
        node = first_node + tl.load(edge_source + source, mask=known, other=0)
        tl.store(to_edge_source + to, node.to(tl.int64), mask=there)
        node = first_node + tl.load(edge_target + source, mask=known, other=0)
        tl.store(to_edge_target + to, node.to(tl.int64), mask=there)
        edge = first_edge + tl.load(source_order + source, mask=known, other=0)
        tl.store(to_source_order + to, edge.to(tl.int64), mask=there)
        tl.store(to_distances + to, tl.load(distances + source, mask=there), mask=there)
        count = tl.load(edge_multiplicities + source, mask=known, other=0)
        tl.store(to_edge_multiplicities + to, count, mask=there)


@triton.jit(do_not_specialize=["n_crystals", "n_tokens"])
def _tokens(
    offsets,
    states,
    rows,
    to_offsets,
    to_states,
    n_crystals,
    n_tokens,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    crystal = tl.minimum(tl.program_id(0), n_crystals)
    pads = crystal == n_crystals
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    if pads:
        piece += (tl.program_id(0) - n_crystals) * pieces
        pieces *= tl.num_programs(0) - n_crystals
    first, start, tokens = _before(rows, offsets, crystal, n_crystals, ROWS)
    if pads:
        tokens = n_tokens - first
    if piece == 0:
        tl.store(to_offsets + crystal, first.to(tl.int64))
        if pads:
            tl.store(to_offsets + n_crystals + 1, n_tokens.to(tl.int64))
    source, to = states + start * WIDTH, to_states + first.to(tl.int64) * WIDTH
    for begin in range(piece * BLOCK, tokens * WIDTH, pieces * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < tokens * WIDTH
        held = tl.load(source + tl.where(pads, place % WIDTH, place), mask=there)
        tl.store(to + place, held, mask=there)


def graphs(held: Graphs, rows: Tensor, nodes: int, edges: int) -> dict[str, Tensor]:
    """See `padding.padded_graphs`."""
    numbers, values = rows.new_empty, held.distances.new_empty
    found = {  # in the order of the kernel's arguments
        "node_offsets": numbers(len(rows) + 2),
        "atomic_numbers": numbers(nodes),
        "multiplicities": values(nodes),
        "shares": values(nodes),
        "edge_starts": numbers(nodes + 1),
        "source_starts": numbers(nodes + 1),
        "edge_source": numbers(edges),
        "edge_target": numbers(edges),
        "source_order": numbers(edges),
        "distances": values(edges),
        "edge_multiplicities": values(edges),
    }
    sizes = len(rows), nodes, edges
    _graphs[_grid(rows, PIECES)](*held, rows, *found.values(), *sizes, _rows(rows), BLOCK)
    return found


def tokens(offsets: Tensor, states: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """See `padding.padded_tokens`."""
    width = states[0].numel()
    own, found = rows.new_empty(len(rows) + 2), states.new_empty(size, *states.shape[1:])
    _tokens[_grid(rows, TOKEN_PIECES)](
        offsets, states, rows, own, found, len(rows), size, width, _rows(rows), TOKEN_BLOCK
    )
    return own, found


def _grid(rows: Tensor, pieces: int) -> tuple[int, int]:
    return len(rows) + triton.cdiv(len(rows), PADDING), pieces


def _rows(rows: Tensor) -> int:
    return max(triton.next_power_of_2(len(rows)), 32)


def example(device: torch.device, generator: torch.Generator) -> tuple[Graphs, Tensor, Tensor]:
    """Random graphs of 40 crystals, some without edges or nodes, and offsets and states of their tokens."""

    def offsets(most: int, nodes: Tensor | None = None) -> Tensor:
        lengths = torch.randint(0, most, (40,), generator=generator)
        return functional.pad((lengths if nodes is None else lengths * (nodes > 0)).cumsum(0), (1, 0))

    def integers(high: Tensor, kind: torch.dtype) -> Tensor:
        return (torch.rand(len(high), generator=generator) * high).to(kind)

    node_offsets = offsets(9)
    node_offsets[-1] += 600  # some crystals are more than a block
    edge_offsets = offsets(30, node_offsets.diff())
    edge_offsets[-1] += 3000
    token_offsets = offsets(20) + torch.arange(41)
    n, e, t = (int(part[-1]) for part in (node_offsets, edge_offsets, token_offsets))
    within = node_offsets.diff().repeat_interleave(edge_offsets.diff())  # nodes of an edge's crystal
    nodes = {"atomic_numbers": integers(torch.full((n,), 118), torch.uint8) + 1}
    nodes["multiplicities"] = 1.0 + integers(torch.full((n,), 9), torch.float32)
    edges = {name: integers(within, torch.int32) for name in ("edge_source", "edge_target")}
    edges |= {name: torch.rand(e, generator=generator) for name in ("distances", "edge_multiplicities")}
    states = torch.randn(t, 24, generator=generator).bfloat16().to(device)
    arrays = ({name: part.to(device) for name, part in kind.items()} for kind in (nodes, edges))
    graphs = Graphs.of(node_offsets.to(device), edge_offsets.to(device), *arrays)
    return graphs, token_offsets.to(device), states


def check(device: torch.device, kind: torch.dtype) -> None:
    """Compare with torch.

    Raises:
        AssertionError: they differ.
    """
    held, offsets, states = example(device, torch.Generator().manual_seed(0))
    for rows in (torch.arange(39, 2, -1), torch.tensor([39])):
        compare(held, offsets, states, rows.to(device), 1500, 9000, 1000)


def compare(
    held: Graphs, offsets: Tensor, states: Tensor, rows: Tensor, nodes: int, edges: int, size: int
) -> None:
    """Whether a batch of those sizes is, bit for bit, that of torch; see `check`."""
    wanted, found = plain_graphs(held, rows, nodes, edges), graphs(held, rows, nodes, edges)
    wanted["token_offsets"], wanted["token_states"] = plain_tokens(offsets, states, rows, size)
    found["token_offsets"], found["token_states"] = tokens(offsets, states, rows, size)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
