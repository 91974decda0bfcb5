"""All message rounds of coGN on a padded batch: a kernel for the edges and one for the nodes, each way.

The functions are those of `models/cogn.py`. A tile of edges or nodes goes through all layers in one program.
For the backward pass the inputs of the activations are kept. Gradients of the weights are sums over edges or
nodes: parts of them, each by a program of its own, which are added up at the end. Every sum is taken in a
fixed order.

N nodes, E edges, R rounds, L layers of the message network behind its first, K basis functions, D the width.
The kernels take the width also as `width`, a number known when they run: so loops over columns remain loops,
a step of which can be loaded while the one before is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from castbench.kernels import PRECISION, compare

EDGES, NODES, ROWS = 64, 16, 32  # of a tile; of one of the sums for the weights
TOGETHER = 4  # edges of a node that are read at once
SPLITS = 16  # parts of a sum for the weights
CHUNK = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # columns that are computed at once


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_slope(x):
    share = tl.sigmoid(x)
    return share * (1 + x * (1 - share))


@triton.jit(do_not_specialize=["n_edges", "width"])
def _edges_forward(
    basis, source, target, projected, entry, hidden, biases, inputs, n_edges, width,
    K: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inputs (L + 1, E, D) of the activations of a round's message network."""
    kind = inputs.dtype.element_ty
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (edge < n_edges)[:, None]
    k, d, c = tl.arange(0, K), tl.arange(0, D), tl.arange(0, CHUNK)
    receiver = tl.load(target + edge, mask=edge < n_edges, other=0)[:, None] * (2 * D)
    sender = tl.load(source + edge, mask=edge < n_edges, other=0)[:, None] * (2 * D) + D
    rows, layer_size = inputs + edge[:, None].to(tl.int64) * D, n_edges.to(tl.int64) * D
    distance = tl.load(basis + edge[:, None] * K + k, mask=real, other=0.0)
    for column in range(0, width, CHUNK):
        weight = tl.load(entry + (column + c) * K + k[:, None])
        x = tl.dot(distance, weight, input_precision=PRECISION)
        x += tl.load(projected + receiver + column + c).to(tl.float32)
        x += tl.load(projected + sender + column + c).to(tl.float32)
        tl.store(rows + column + c, x.to(kind), mask=real)
    for layer in range(L):
        tl.debug_barrier()  # the program's other threads have written what is read now
        active = _silu(tl.load(rows + d, mask=real, other=0.0).to(tl.float32)).to(kind)
        rows += layer_size
        for column in range(0, width, CHUNK):
            weight = tl.load(hidden + layer * (D * D) + (column + c) * D + d[:, None])
            x = tl.dot(active, weight, input_precision=PRECISION)
            x += tl.load(biases + layer * D + column + c)
            tl.store(rows + column + c, x.to(kind), mask=real)


@triton.jit(do_not_specialize=["n_edges", "width"])
def _edges_backward(
    inputs, of_received, target, m, hidden, of_inputs, n_edges, width,
    D: tl.constexpr, L: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients (L + 1, E, D) of what `_edges_forward` found, from those of the sums (N, D)."""
    kind = inputs.dtype.element_ty
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (edge < n_edges)[:, None]
    d, c = tl.arange(0, D), tl.arange(0, CHUNK)
    to = tl.load(target + edge, mask=edge < n_edges, other=0)[:, None] * D
    times = tl.load(m + edge, mask=edge < n_edges, other=0.0)[:, None]
    layer_size = n_edges.to(tl.int64) * D
    place = edge[:, None].to(tl.int64) * D + L * layer_size
    for column in range(0, width, CHUNK):
        gradient = tl.load(of_received + to + column + c) * times
        x = tl.load(inputs + place + column + c, mask=real, other=0.0).to(tl.float32)
        tl.store(of_inputs + place + column + c, (gradient * _silu_slope(x)).to(kind), mask=real)
    for back in range(L):
        tl.debug_barrier()  # see above
        before = tl.load(of_inputs + place + d, mask=real, other=0.0)
        place -= layer_size
        for column in range(0, width, CHUNK):
            weight = tl.load(hidden + (L - 1 - back) * (D * D) + d[:, None] * D + column + c)
            gradient = tl.dot(before, weight, input_precision=PRECISION)
            x = tl.load(inputs + place + column + c, mask=real, other=0.0).to(tl.float32)
            tl.store(of_inputs + place + column + c, (gradient * _silu_slope(x)).to(kind), mask=real)


@triton.jit
def _sum_of_edges(
    rows, m, starts, order, node, n_nodes,
    D: tl.constexpr, TOGETHER: tl.constexpr, ACTIVE: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Sums (nodes, D) of the rows of each node's edges; if ACTIVE, of m SiLU(row)."""
    begin = tl.load(starts + node, mask=node < n_nodes, other=0)
    end = tl.load(starts + node + 1, mask=node < n_nodes, other=0)
    total = tl.zeros([node.shape[0], D], tl.float32)
    for i in range(0, tl.max(end - begin, axis=0), TOGETHER):
        edge = begin[:, None] + i + tl.arange(0, TOGETHER)
        inside = edge < end[:, None]
        if ORDERED:
            edge = tl.load(order + edge, mask=inside, other=0)
        x = tl.load(rows + edge[:, :, None] * D + tl.arange(0, D), mask=inside[:, :, None], other=0.0)
        x = x.to(tl.float32)
        if ACTIVE:
            x = _silu(x) * tl.load(m + edge, mask=inside, other=0.0)[:, :, None]
        total += tl.sum(x, axis=1)
    return total


@triton.jit(do_not_specialize=["n_nodes", "width"])
def _nodes_forward(
    states, last, m, starts, update, update_bias, received, updates, new_states,
    first, entry_bias, projected, n_nodes, width,
    D: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
    RECEIVES: tl.constexpr, PROJECTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Nodes after a round, from the last inputs (E, D) of its messages, and their parts of the next round."""
    kind = received.dtype.element_ty
    node = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (node < n_nodes)[:, None]
    d, c = tl.arange(0, D), tl.arange(0, CHUNK)
    rows = node[:, None] * D
    if RECEIVES:
        sums = _sum_of_edges(last, m, starts, starts, node, n_nodes, D, TOGETHER, True, False).to(kind)
        tl.store(received + rows + d, sums, mask=real)
        for column in range(0, width, CHUNK):
            weight = tl.load(update + (column + c) * D + d[:, None])
            x = tl.dot(sums, weight, input_precision=PRECISION) + tl.load(update_bias + column + c)
            place = rows + column + c
            tl.store(updates + place, x.to(kind), mask=real)
            state = tl.load(states + place, mask=real, other=0.0) + _silu(x.to(kind).to(tl.float32))
            tl.store(new_states + place, state, mask=real)
        tl.debug_barrier()
        states = new_states
    if PROJECTS:
        state = tl.load(states + rows + d, mask=real, other=0.0).to(kind)
        for column in range(0, 2 * width, CHUNK):  # as receivers, then as senders
            part = column // D
            weight = tl.load(first + (column - part * D + c) * (3 * D) + (1 + part) * D + d[:, None])
            x = tl.dot(state, weight, input_precision=PRECISION)
            x += tl.load(entry_bias + column + c, mask=column + c < D, other=0.0)
            tl.store(projected + 2 * rows + column + c, x.to(kind), mask=real)


@triton.jit(do_not_specialize=["n_nodes", "width"])
def _nodes_backward(
    of_states, of_first, starts, order, source_starts, first, of_projected, of_earlier,
    updates, update, of_updates, of_received, n_nodes, width,
    D: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
    PROJECTED: tl.constexpr, RECEIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of nodes before a round, and of what they received in the one before."""
    kind = of_updates.dtype.element_ty
    node = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (node < n_nodes)[:, None]
    d, c = tl.arange(0, D), tl.arange(0, CHUNK)
    rows = node[:, None] * D
    if PROJECTED:
        to = _sum_of_edges(of_first, of_first, starts, order, node, n_nodes, D, TOGETHER, False, False)
        out_of = _sum_of_edges(
            of_first, of_first, source_starts, order, node, n_nodes, D, TOGETHER, False, True
        )
        to, out_of = to.to(kind), out_of.to(kind)
        tl.store(of_projected + 2 * rows + d, to, mask=real)
        tl.store(of_projected + 2 * rows + D + d, out_of, mask=real)
    for column in range(0, width, CHUNK):
        place = rows + column + c
        gradient = tl.load(of_states + place, mask=real, other=0.0)
        if PROJECTED:
            weight = first + d[:, None] * (3 * D) + D + column + c
            gradient += tl.dot(to, tl.load(weight), input_precision=PRECISION)
            gradient += tl.dot(out_of, tl.load(weight + D), input_precision=PRECISION)
            tl.store(of_earlier + place, gradient, mask=real)
        if RECEIVED:
            x = tl.load(updates + place, mask=real, other=0.0).to(tl.float32)
            tl.store(of_updates + place, (gradient * _silu_slope(x)).to(kind), mask=real)
    if RECEIVED:
        tl.debug_barrier()
        before = tl.load(of_updates + rows + d, mask=real, other=0.0)
        for column in range(0, width, CHUNK):
            weight = tl.load(update + d[:, None] * D + column + c)
            gradient = tl.dot(before, weight, input_precision=PRECISION)
            tl.store(of_received + rows + column + c, gradient, mask=real)


@triton.jit(do_not_specialize=["n_rows"])
def _products(
    left, right, parts, n_rows,
    D: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, LEFT_FIRST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, RIGHT_STEP: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, ACTIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts (P, SPLITS, D + 1, C) of sums over rows: of left (D) times right (C), and last of left alone.

    Problem p has the matrices (n_rows, D) and (n_rows, C) number LEFT (p // GROUP) + p % GROUP + LEFT_FIRST
    of `left` and RIGHT (p // GROUP) + RIGHT_STEP (p % GROUP) of `right`.
    """
    problem, split, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * CHUNK
    group, place = problem // GROUP, problem % GROUP
    d, c, n = tl.arange(0, D), column + tl.arange(0, CHUNK), n_rows.to(tl.int64)
    left += (LEFT * group + place + LEFT_FIRST) * n * D
    right += (RIGHT * group + RIGHT_STEP * place) * n * C
    kind = left.dtype.element_ty
    each = tl.cdiv(tl.cdiv(n_rows, TILE), SPLITS) * TILE
    total, alone = tl.zeros([D, CHUNK], tl.float32), tl.zeros([D], tl.float32)
    for start in range(split * each, tl.minimum((split + 1) * each, n_rows), TILE):
        row = (start + tl.arange(0, TILE))[:, None]
        x = tl.load(left + row.to(tl.int64) * D + d, mask=row < n_rows, other=0.0)
        y = tl.load(right + row.to(tl.int64) * C + c, mask=row < n_rows, other=0.0)
        if ACTIVE:
            y = _silu(y.to(tl.float32))
        total += tl.dot(tl.trans(x), y.to(kind), input_precision=PRECISION)
        alone += tl.sum(x.to(tl.float32), axis=0)
    parts += (problem * SPLITS + split) * (D * C + D)
    tl.store(parts + d[:, None] * C + c, total)
    if column == 0:
        tl.store(parts + D * C + d, alone)


class Rounds(torch.autograd.Function):
    """Node states (N, D) after R rounds of messages, float32.

    Args of `apply`:
        states: (N, D) before them.
        basis: (E, K) of the edges; constant, as are the next six.
        m, source, target: (E,) multiplicities and nodes of the edges, sorted by target.
        starts, order, source_starts: (N + 1,), (E,), (N + 1,), as in `Batch`.
        kind: type of the products; sums over edges, and states, are in float32.
        edge_weight, edge_bias: (D, K), (D,) of the edge input layer.
        first: (R, D, 3 D), columns for edge, receiver and sender.
        hidden: (R, L, D, D).
        update: (R, D, D).
        biases: (R, L + 2, D), of the layers in this order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        basis: Tensor,
        m: Tensor,
        source: Tensor,
        target: Tensor,
        starts: Tensor,
        order: Tensor,
        source_starts: Tensor,
        kind: torch.dtype,
        edge_weight: Tensor,
        edge_bias: Tensor,
        first: Tensor,
        hidden: Tensor,
        update: Tensor,
        biases: Tensor,
    ) -> Tensor:
        """See the class."""
        rounds, layers, d = hidden.shape[:3]
        (n_edges, k), n_nodes = basis.shape, len(states)
        edge_input = torch.cat([edge_weight, edge_bias[:, None]], 1)
        with torch.autocast(states.device.type, enabled=False):
            entry = (first.view(rounds * d, 3 * d)[:, :d] @ edge_input).view(rounds, d, k + 1)
        entry_bias = entry[..., k] + biases[:, 0]
        weights = entry[..., :k].to(kind, copy=True), first.to(kind), hidden.to(kind), update.to(kind)
        entry, own_first, own_hidden, own_update = (part.contiguous() for part in weights)
        basis = basis.to(kind)
        every_state = states.new_empty(rounds + 1, n_nodes, d, dtype=torch.float32)
        every_state[0] = states
        inputs = basis.new_empty(rounds, layers + 1, n_edges, d)
        received, updates = basis.new_empty(2, rounds, n_nodes, d)
        projected = basis.new_empty(n_nodes, 2, d)
        for r in range(rounds + 1):
            before, after = max(r - 1, 0), min(r, rounds - 1)  # the round that ends here, and the next
            _nodes_forward[_tiles(n_nodes, NODES)](
                every_state[before], inputs[before, -1], m, starts, own_update[before], biases[before, -1],
                received[before], updates[before], every_state[r],
                own_first[after], entry_bias[after], projected, n_nodes, d,
                RECEIVES=r > 0, PROJECTS=r < rounds, TOGETHER=TOGETHER, **_settings(NODES, d, kind),
            )  # fmt: skip
            if r < rounds:
                _edges_forward[_tiles(n_edges, EDGES)](
                    basis, source, target, projected, entry[r], own_hidden[r], biases[r, 1:], inputs[r],
                    n_edges, d, K=k, L=layers, **_settings(EDGES, d, kind),
                )  # fmt: skip
        ctx.save_for_backward(
            basis, m, target, starts, order, source_starts, edge_input, first, own_first, own_hidden,
            own_update, every_state, inputs, received, updates,
        )  # fmt: skip
        ctx.kind_of_states = states.dtype
        return every_state[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the states before, and of the weights."""
        (
            basis, m, target, starts, order, source_starts, edge_input, first, own_first, own_hidden,
            own_update, every_state, inputs, received, updates,
        ) = ctx.saved_tensors  # fmt: skip
        (rounds, layers, d), kind = own_hidden.shape[:3], basis.dtype
        (n_edges, k), n_nodes = basis.shape, every_state.shape[1]
        of_state = gradients[0].float().contiguous()
        of_inputs, of_projected = torch.empty_like(inputs), basis.new_empty(rounds, n_nodes, 2, d)
        of_updates, of_received = torch.empty_like(updates), of_state.new_empty(n_nodes, d)
        for r in range(rounds, -1, -1):
            before, after = max(r - 1, 0), min(r, rounds - 1)
            of_earlier = torch.empty_like(of_state) if r < rounds else of_state
            _nodes_backward[_tiles(n_nodes, NODES)](
                of_state, of_inputs[after, 0], starts, order, source_starts, own_first[after],
                of_projected[after], of_earlier, updates[before], own_update[before], of_updates[before],
                of_received, n_nodes, d,
                PROJECTED=r < rounds, RECEIVED=r > 0, TOGETHER=TOGETHER, **_settings(NODES, d, kind),
            )  # fmt: skip
            of_state = of_earlier
            if r > 0:
                _edges_backward[_tiles(n_edges, EDGES)](
                    inputs[before], of_received, target, m, own_hidden[before], of_inputs[before],
                    n_edges, d, L=layers, **_settings(EDGES, d, kind),
                )  # fmt: skip
        of_hidden, of_hidden_bias = _weight_gradients(
            of_inputs, inputs, n_edges, (d, d), rounds * layers, active=True,
            GROUP=layers, LEFT=layers + 1, LEFT_FIRST=1, RIGHT=layers + 1, RIGHT_STEP=1,
        )  # fmt: skip
        of_entry, of_first_bias = _weight_gradients(
            of_inputs, basis, n_edges, (d, k), rounds, LEFT=layers + 1, RIGHT=0
        )
        of_ends, _ = _weight_gradients(of_projected, every_state, n_nodes, (2 * d, d), rounds)
        of_update, of_update_bias = _weight_gradients(of_updates, received, n_nodes, (d, d), rounds)
        of_entry = torch.cat([of_entry, of_first_bias[..., None]], 2).view(rounds * d, k + 1)
        of_edge_input = first.view(rounds * d, 3 * d)[:, :d].T @ of_entry
        of_edge = (of_entry @ edge_input.T).view(rounds, d, d)
        of_first = torch.cat([of_edge, of_ends[:, :d], of_ends[:, d:]], 2)
        of_biases = [of_first_bias[:, None], of_hidden_bias.view(rounds, layers, d), of_update_bias[:, None]]
        return (
            of_state.to(ctx.kind_of_states), *(None,) * 8, of_edge_input[:, :k], of_edge_input[:, k],
            of_first, of_hidden.view(rounds, layers, d, d), of_update, torch.cat(of_biases, 1),
        )  # fmt: skip


def _weight_gradients(
    left: Tensor, right: Tensor, rows: int, shape: tuple[int, int], problems: int, active: bool = False,
    GROUP: int = 1, LEFT: int = 1, LEFT_FIRST: int = 0, RIGHT: int = 1, RIGHT_STEP: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients (P, *shape) and (P, shape[0]) of matrices and biases of P linear layers; see `_products`."""
    d, c = shape
    chunk = min(64, c)
    parts = left.new_empty(problems, SPLITS, d * c + d, dtype=torch.float32)
    _products[problems, SPLITS, c // chunk](
        left, right, parts, rows, D=d, C=c, CHUNK=chunk, GROUP=GROUP, LEFT=LEFT, LEFT_FIRST=LEFT_FIRST,
        RIGHT=RIGHT, RIGHT_STEP=RIGHT_STEP, TILE=ROWS, SPLITS=SPLITS, ACTIVE=active,
        PRECISION=PRECISION, num_warps=8, num_stages=2,
    )  # fmt: skip
    total = parts.sum(1)
    return total[:, : d * c].view(problems, d, c), total[:, d * c :]


def _tiles(rows: int, size: int) -> tuple[int]:
    return (triton.cdiv(rows, size),)


def _settings(tile: int, width: int, kind: torch.dtype) -> dict[str, Any]:
    return {
        "D": width,
        "TILE": tile,
        "CHUNK": min(CHUNK[kind], width),
        "PRECISION": PRECISION,
        "num_warps": 4,
        "num_stages": 2,
    }


def check(device: torch.device, kind: torch.dtype) -> None:
    """See that `CoGN` finds what its blocks do one by one; see `kernels.usable`."""
    from castbench.models.batch import Batch
    from castbench.models.cogn import N_BASIS, CoGN

    torch.manual_seed(0)
    nodes, edges = 40, 600
    source, target = torch.randint(nodes, (edges,)), torch.randint(nodes, (edges,)).sort().values
    starts, source_starts = (
        functional.pad(end.bincount(minlength=nodes).cumsum(0), (1, 0)) for end in (target, source)
    )
    batch = Batch(
        n=1, edge_source=source, edge_target=target, edge_starts=starts,
        source_order=source.argsort(stable=True), source_starts=source_starts,
        edge_multiplicities=torch.randint(1, 4, (edges,)).float(),
    ).to(device)  # fmt: skip
    basis = torch.rand(edges, N_BASIS, device=device)
    model = CoGN(width=128, depth=2).to(device)
    states = torch.randn(nodes, model.width, device=device)
    parameters = [model.edge_input.weight, model.edge_input.bias, *model.blocks.parameters()]
    with torch.autocast(device.type, kind, enabled=kind is not torch.float32):
        found, wanted = model.rounds_together(states, basis, batch, kind), states
        for block in model.blocks:
            wanted = block(wanted, basis, model.edge_input, batch)
    weights = torch.randn_like(states)
    one, other = ([x, *torch.autograd.grad((x.float() * weights).sum(), parameters)] for x in (found, wanted))
    compare(one, other, kind)
