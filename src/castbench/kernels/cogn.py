"""All message rounds of coGN on a padded batch: a kernel for the edges and one for the nodes, each way.

The functions are those of `models/cogn.py`. A tile of edges or nodes goes through all layers in one program,
its rows in registers from one to the next; weights pass through shared memory, the next while the last are in
use. Float32 factors are taken as three bfloat16 parts (see `parts`), of weights split once a step, with
float32 sums.

For the backward pass the inputs of the activations are kept. Gradients of the weights are sums over edges or
nodes: parts of them, each by a program of its own, which are added up at the end. Every sum is taken in a
fixed order.

N nodes, E edges, R rounds, L layers of the message network behind its first, K basis functions, D the width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from castbench.kernels import compare, shared_memory
from castbench.kernels.parts import parts_of, split

PROGRAMS = 264  # at most, that share the sums for weights of a kind: two for a multiprocessor of an H100
# TILE: edges or nodes of a program, or of one step of a sum. TOGETHER: edges of a node that are read at once.
OF_NODES = {"TILE": 16, "TOGETHER": 4, "num_warps": 8, "num_stages": 2}
OF_EDGES = {"TILE": 32, "num_warps": 8, "num_stages": 2}
OF_WEIGHTS = {"TILE": 64, "num_warps": 8, "num_stages": 3}
DEEP = 184_320  # bytes that three stages of these take in float32, and of the others two:
TWO_DEEP = 122_880


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_slope(x):
    share = tl.sigmoid(x)
    return share * (1 + x * (1 - share))


@triton.jit
def _product(x, weight, total, STEP: tl.constexpr, PARTS: tl.constexpr):
    """Total (M, N) and x (M, K), float32, times a matrix (K, N) at `weight`, with its parts STEP apart."""
    x_one, x_two, x_three = split(x, weight.dtype.scalar.element_ty, PARTS)
    if PARTS == 3:
        total = tl.dot(x_one, tl.load(weight + 2 * STEP), total)
        two = tl.load(weight + STEP)
        total = tl.dot(x_two, two, total)
        total = tl.dot(x_one, two, total)
        one = tl.load(weight)
        total = tl.dot(x_three, one, total)
        total = tl.dot(x_two, one, total)
        total = tl.dot(x_one, one, total)
    else:
        total = tl.dot(x_one, tl.load(weight), total)
    return total


@triton.jit(do_not_specialize=["n_edges"])
def _edges_forward(
    basis, source, target, projected, entry, hidden, biases, inputs, n_edges,
    K: tl.constexpr, D: tl.constexpr, L: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Inputs (L + 1, E, D) of the activations of a round's message network."""
    kind = inputs.dtype.element_ty
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (edge < n_edges)[:, None]
    k, d = tl.arange(0, K), tl.arange(0, D)
    receiver = tl.load(target + edge, mask=edge < n_edges, other=0)[:, None] * (2 * D) + d
    sender = tl.load(source + edge, mask=edge < n_edges, other=0)[:, None] * (2 * D) + D + d
    rows, layer_size = inputs + edge[:, None].to(tl.int64) * D + d, n_edges.to(tl.int64) * D
    distance = tl.load(basis + edge[:, None] * K + k, mask=real, other=0.0).to(tl.float32)
    x = tl.load(projected + receiver).to(tl.float32) + tl.load(projected + sender).to(tl.float32)
    x = _product(distance, entry + d * K + k[:, None], x, STEP, PARTS)
    tl.store(rows, x.to(kind), mask=real)
    for layer in range(L):
        active = _silu(x.to(kind).to(tl.float32))
        x = tl.zeros([TILE, D], tl.float32) + tl.load(biases + layer * D + d)
        x = _product(active, hidden + layer * (D * D) + d * D + d[:, None], x, STEP, PARTS)
        rows += layer_size
        tl.store(rows, x.to(kind), mask=real)


@triton.jit(do_not_specialize=["n_edges"])
def _edges_backward(
    inputs, of_received, target, m, hidden, of_inputs, n_edges,
    D: tl.constexpr, L: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients (L + 1, E, D) of what `_edges_forward` found, from those of the sums (N, D)."""
    kind = inputs.dtype.element_ty
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (edge < n_edges)[:, None]
    d = tl.arange(0, D)
    to = tl.load(target + edge, mask=edge < n_edges, other=0)[:, None] * D + d
    times = tl.load(m + edge, mask=edge < n_edges, other=0.0)[:, None]
    layer_size = n_edges.to(tl.int64) * D
    place = edge[:, None].to(tl.int64) * D + d + L * layer_size
    x = tl.load(inputs + place, mask=real, other=0.0).to(tl.float32)
    gradient = (tl.load(of_received + to) * times * _silu_slope(x)).to(kind)
    tl.store(of_inputs + place, gradient, mask=real)
    for back in range(L):
        place -= layer_size
        x = tl.load(inputs + place, mask=real, other=0.0).to(tl.float32)
        weight = hidden + (L - 1 - back) * (D * D) + d[:, None] * D + d
        before = tl.zeros([TILE, D], tl.float32)
        before = _product(gradient.to(tl.float32), weight, before, STEP, PARTS)
        gradient = (before * _silu_slope(x)).to(kind)
        tl.store(of_inputs + place, gradient, mask=real)


@triton.jit
def _edges_of(starts, node, n_nodes):
    """First edge (nodes,) of each node, and the one behind its last."""
    begin = tl.load(starts + node, mask=node < n_nodes, other=0)
    return begin, tl.load(starts + node + 1, mask=node < n_nodes, other=0)


@triton.jit
def _rows_of_edges(rows, order, edge, end, D: tl.constexpr, ORDERED: tl.constexpr):
    """Rows (nodes, edges, D) of some edges of each node, which has those before `end`, and 0 for others."""
    inside = edge < end[:, None]
    if ORDERED:
        edge = tl.load(order + edge, mask=inside, other=0)
    places = rows + edge[:, :, None] * D + tl.arange(0, D)
    return tl.load(places, mask=inside[:, :, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_nodes"])
def _nodes_forward(
    states, last, m, starts, update, update_bias, received, updates, new_states,
    first, entry_bias, projected, n_nodes,
    D: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr,
    RECEIVES: tl.constexpr, PROJECTS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Nodes after a round, from the last inputs (E, D) of its messages, and their parts of the next round."""
    kind = received.dtype.element_ty
    node = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (node < n_nodes)[:, None]
    d = tl.arange(0, D)
    rows = node[:, None] * D + d
    state = tl.load(states + rows, mask=real, other=0.0)
    if RECEIVES:
        begin, end = _edges_of(starts, node, n_nodes)
        sums = tl.zeros([TILE, D], tl.float32)
        for i in range(0, tl.max(end - begin, axis=0), TOGETHER):
            edge = begin[:, None] + i + tl.arange(0, TOGETHER)
            times = tl.load(m + edge, mask=edge < end[:, None], other=0.0)
            sums += tl.sum(
                _silu(_rows_of_edges(last, starts, edge, end, D, False)) * times[:, :, None], axis=1
            )
        sums = sums.to(kind)
        tl.store(received + rows, sums, mask=real)
        x = tl.zeros([TILE, D], tl.float32) + tl.load(update_bias + d)
        x = _product(sums.to(tl.float32), update + d * D + d[:, None], x, STEP, PARTS)
        tl.store(updates + rows, x.to(kind), mask=real)
        state += _silu(x.to(kind).to(tl.float32))
        tl.store(new_states + rows, state, mask=real)
    if PROJECTS:
        for part in range(2):  # as receivers, then as senders
            weight = first + d * (3 * D) + (1 + part) * D + d[:, None]
            bias = tl.load(entry_bias + d) * (1 - part)
            x = _product(state, weight, tl.zeros([TILE, D], tl.float32) + bias, STEP, PARTS)
            tl.store(projected + rows + node[:, None] * D + part * D, x.to(kind), mask=real)


@triton.jit(do_not_specialize=["n_nodes"])
def _nodes_backward(
    of_states, of_first, starts, order, source_starts, first, of_projected, of_earlier,
    updates, update, of_updates, of_received, n_nodes,
    D: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr,
    PROJECTED: tl.constexpr, RECEIVED: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of nodes before a round, and of what they received in the one before."""
    kind = of_updates.dtype.element_ty
    node = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = (node < n_nodes)[:, None]
    d = tl.arange(0, D)
    rows = node[:, None] * D + d
    gradient = tl.load(of_states + rows, mask=real, other=0.0)
    if PROJECTED:
        begin, end = _edges_of(starts, node, n_nodes)
        source_begin, source_end = _edges_of(source_starts, node, n_nodes)
        to, out_of = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
        most = tl.maximum(tl.max(end - begin, axis=0), tl.max(source_end - source_begin, axis=0))
        for i in range(0, most, TOGETHER):
            place = i + tl.arange(0, TOGETHER)
            to += tl.sum(_rows_of_edges(of_first, order, begin[:, None] + place, end, D, False), axis=1)
            edge = source_begin[:, None] + place
            out_of += tl.sum(_rows_of_edges(of_first, order, edge, source_end, D, True), axis=1)
        to, out_of = to.to(kind), out_of.to(kind)
        both = of_projected + rows + node[:, None] * D
        tl.store(both, to, mask=real)
        tl.store(both + D, out_of, mask=real)
        weight = first + d[:, None] * (3 * D) + D + d
        gradient = _product(to.to(tl.float32), weight, gradient, STEP, PARTS)
        gradient = _product(out_of.to(tl.float32), weight + D, gradient, STEP, PARTS)
        tl.store(of_earlier + rows, gradient, mask=real)
    if RECEIVED:
        x = tl.load(updates + rows, mask=real, other=0.0).to(tl.float32)
        of_update = (gradient * _silu_slope(x)).to(kind)
        tl.store(of_updates + rows, of_update, mask=real)
        before = tl.zeros([TILE, D], tl.float32)
        before = _product(of_update.to(tl.float32), update + d[:, None] * D + d, before, STEP, PARTS)
        tl.store(of_received + rows, before, mask=real)


@triton.jit(do_not_specialize=["n_rows"])
def _products(
    left, right, parts, n_rows,
    D: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, LEFT_FIRST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, RIGHT_STEP: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, ACTIVE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parts (P, pieces, D + 1, C) of sums over rows: of left (D) times right (C), and last of left alone.

    Problem p has the matrices (n_rows, D) and (n_rows, C) number LEFT (p // GROUP) + p % GROUP + LEFT_FIRST
    of `left` and RIGHT (p // GROUP) + RIGHT_STEP (p % GROUP) of `right`. A program has CHUNK columns of left.
    """
    problem, column = tl.program_id(0), tl.program_id(2) * CHUNK
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    group, place = problem // GROUP, problem % GROUP
    d, c, n = column + tl.arange(0, CHUNK), tl.arange(0, C), n_rows.to(tl.int64)
    left += (LEFT * group + place + LEFT_FIRST) * n * D
    right += (RIGHT * group + RIGHT_STEP * place) * n * C
    kind: tl.constexpr = tl.bfloat16 if PARTS == 3 else left.dtype.element_ty
    each = tl.cdiv(tl.cdiv(n_rows, TILE), pieces) * TILE
    total, alone = tl.zeros([CHUNK, C], tl.float32), tl.zeros([CHUNK], tl.float32)
    for start in range(piece * each, tl.minimum((piece + 1) * each, n_rows), TILE):
        row = (start + tl.arange(0, TILE))[:, None]
        x = tl.load(left + row.to(tl.int64) * D + d, mask=row < n_rows, other=0.0)
        y = tl.load(right + row.to(tl.int64) * C + c, mask=row < n_rows, other=0.0)
        if ACTIVE:
            y = _silu(y.to(tl.float32))
        alone += tl.sum(x.to(tl.float32), axis=0)
        x_one, x_two, x_three = split(x, kind, PARTS)
        y_one, y_two, y_three = split(y, kind, PARTS)
        if PARTS == 3:
            total = tl.dot(tl.trans(x_three), y_one, total)
            total = tl.dot(tl.trans(x_two), y_two, total)
            total = tl.dot(tl.trans(x_one), y_three, total)
            total = tl.dot(tl.trans(x_two), y_one, total)
            total = tl.dot(tl.trans(x_one), y_two, total)
        total = tl.dot(tl.trans(x_one), y_one, total)
    parts += (problem * pieces + piece) * (D * C + D)
    tl.store(parts + d[:, None] * C + c, total)
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
        entry, own_first, own_hidden, own_update = _factors([entry[..., :k], first, hidden, update], kind)
        step, basis = {"STEP": own_first.stride(0), "PARTS": len(own_first)}, basis.to(kind)
        every_state = states.new_empty(rounds + 1, n_nodes, d, dtype=torch.float32)
        every_state[0] = states
        inputs = basis.new_empty(rounds, layers + 1, n_edges, d)
        received, updates = basis.new_empty(2, rounds, n_nodes, d)
        projected = basis.new_empty(n_nodes, 2, d)
        of_nodes, of_edges = _staged(OF_NODES, inputs), _staged(OF_EDGES, inputs)
        for r in range(rounds + 1):
            before, after = max(r - 1, 0), min(r, rounds - 1)  # the round that ends here, and the next
            _nodes_forward[_tiles(n_nodes, of_nodes)](
                every_state[before], inputs[before, -1], m, starts, own_update[0, before], biases[before, -1],
                received[before], updates[before], every_state[r],
                own_first[0, after], entry_bias[after], projected, n_nodes,
                D=d, RECEIVES=r > 0, PROJECTS=r < rounds, **step, **of_nodes,
            )  # fmt: skip
            if r < rounds:
                _edges_forward[_tiles(n_edges, of_edges)](
                    basis, source, target, projected, entry[0, r], own_hidden[0, r], biases[r, 1:], inputs[r],
                    n_edges, K=k, D=d, L=layers, **step, **of_edges,
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
        parts, rounds, layers, d = own_hidden.shape[:4]
        step = {"STEP": own_hidden.stride(0), "PARTS": parts}
        (n_edges, k), n_nodes = basis.shape, every_state.shape[1]
        of_state = gradients[0].float().contiguous()
        of_inputs, of_projected = torch.empty_like(inputs), basis.new_empty(rounds, n_nodes, 2, d)
        of_updates, of_received = torch.empty_like(updates), of_state.new_empty(n_nodes, d)
        of_nodes, of_edges = _staged(OF_NODES, inputs), _staged(OF_EDGES, inputs)
        for r in range(rounds, -1, -1):
            before, after = max(r - 1, 0), min(r, rounds - 1)
            of_earlier = torch.empty_like(of_state) if r < rounds else of_state
            _nodes_backward[_tiles(n_nodes, of_nodes)](
                of_state, of_inputs[after, 0], starts, order, source_starts, own_first[0, after],
                of_projected[after], of_earlier, updates[before], own_update[0, before], of_updates[before],
                of_received, n_nodes, D=d, PROJECTED=r < rounds, RECEIVED=r > 0, **step, **of_nodes,
            )  # fmt: skip
            of_state = of_earlier
            if r > 0:
                _edges_backward[_tiles(n_edges, of_edges)](
                    inputs[before], of_received, target, m, own_hidden[0, before], of_inputs[before],
                    n_edges, D=d, L=layers, **step, **of_edges,
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
    (d, c), settings = shape, OF_WEIGHTS
    if left.is_cuda and shared_memory(left.device) < DEEP:
        settings = settings | {"num_stages": 2}
    chunk = min(128, d)
    splits = max(min(PROGRAMS * chunk // (problems * d), *_tiles(rows, settings)), 1)
    parts = left.new_empty(problems, splits, d * c + d, dtype=torch.float32)
    _products[problems, splits, d // chunk](
        left, right, parts, rows, D=d, C=c, GROUP=GROUP, LEFT=LEFT, LEFT_FIRST=LEFT_FIRST, RIGHT=RIGHT,
        RIGHT_STEP=RIGHT_STEP, CHUNK=chunk, ACTIVE=active,
        PARTS=3 if left.dtype == torch.float32 else 1, **settings,
    )  # fmt: skip
    total = parts.sum(1)
    return total[:, : d * c].view(problems, d, c), total[:, d * c :]


def _tiles(rows: int, settings: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, settings["TILE"]),)


def _staged(settings: dict[str, int], like: Tensor) -> dict[str, int]:
    """`settings` with which a kernel on data like these fits into the GPU's shared memory."""
    small = like.is_cuda and shared_memory(like.device) < TWO_DEEP
    return settings | {"num_stages": 1} if small and like.dtype == torch.float32 else settings


def _factors(weights: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Matrices as factors (PARTS, *shape) of products in a type: float32 as the sum of three bfloat16."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    parts = (parts_of(flat[None], 3) if kind == torch.float32 else flat.to(kind)).view(-1, len(flat))
    every = parts.split([weight.numel() for weight in weights], 1)
    return [part.unflatten(1, weight.shape) for part, weight in zip(every, weights, strict=True)]


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
