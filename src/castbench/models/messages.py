"""Messages along the edges of a graph, summed at their receivers: coGN's costly part, forward and backward.

The network of a message is an MLP whose first layer is linear in edge, receiver and sender, so that the parts
of the nodes are computed once a node and gathered. On the CPU, edges go through all layers a few at a time:
what one layer writes the next still finds in the cache. Only the inputs of the activations are kept for the
backward pass, half of what autograd would keep. On a GPU, edges of padded batches are summed in order, each
node's one after the other, so that no two threads add to one place and the bits are always the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
EDGES = 1024  # of a piece on the CPU: with three rows of 128 float32 each, they fit a core's own cache


class Messages(torch.autograd.Function):
    """Sums (N, d) over the incoming edges of m * MLP(edge, receiver, sender), SiLU behind every layer.

    Args of `apply`, E edges of N nodes in width d, and L layers behind the first:
        edges (E, k): inputs of the edges; constant, as are m (E,), source (E,) and target (E,).
        receiver, sender (N, d): the nodes' parts of the first layer, before its activation.
        weight (d, k), bias (d,): the edges' part of the first layer.
        weights (L, d, d), biases (L, d): the other layers.

    Products are in the type of `receiver` (bfloat16 under autocast), sums over edges in that of m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        edges: Tensor,
        m: Tensor,
        source: Tensor,
        target: Tensor,
        receiver: Tensor,
        sender: Tensor,
        weight: Tensor,
        bias: Tensor,
        weights: Tensor,
        biases: Tensor,
    ) -> Tensor:
        """See the class."""
        receiver = receiver + bias
        # Of the activations. A tensor each: what is larger, the C library returns to the system every time.
        inputs = [receiver.new_empty(len(edges), receiver.shape[1]) for _ in range(len(weights) + 1)]
        output = receiver.new_empty(_piece(edges), receiver.shape[1])
        received = m.new_zeros(receiver.shape)
        first, others = weight.T.contiguous(), weights.mT.contiguous()
        for part, to, active in _pieces(target, output):
            x = torch.mm(edges[part], first, out=inputs[0][part])
            x += receiver.index_select(0, to)
            x += sender.index_select(0, source[part])
            for layer, matrix in enumerate(others):
                aten.silu.out(x, out=active)
                x = torch.mm(active, matrix, out=inputs[layer + 1][part]).add_(biases[layer])
            received.index_add_(0, to, aten.silu.out(x, out=active) * m[part, None])
        ctx.save_for_backward(edges, m, source, target, weight, weights, *inputs)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all but the constants."""
        edges, m, source, target, weight, weights, *inputs = ctx.saved_tensors
        (of_received,) = gradients
        of_receiver, of_sender = torch.zeros_like(of_received), torch.zeros_like(of_received)
        # In float32: pieces add up, which bfloat16 would round each time.
        of_weight, of_weights = (torch.zeros_like(part, dtype=m.dtype) for part in (weight, weights))
        of_biases = of_weight.new_zeros(len(inputs), len(weight))
        space = weights.new_empty(3, _piece(edges), len(weight))
        for part, to, active, before, after in _pieces(target, *space):
            after.copy_(of_received.index_select(0, to) * m[part, None])
            for layer in range(len(weights), 0, -1):
                aten.silu_backward.grad_input(after, inputs[layer][part], grad_input=before)
                of_biases[layer] += before.sum(0)
                aten.silu.out(inputs[layer - 1][part], out=active)
                _add_product(of_weights[layer - 1], before, active)
                torch.mm(before, weights[layer - 1], out=after)
            aten.silu_backward.grad_input(after, inputs[0][part], grad_input=before)
            of_biases[0] += before.sum(0)
            _add_product(of_weight, before, edges[part])
            of_receiver.index_add_(0, to, before.to(m.dtype))
            of_sender.index_add_(0, source[part], before.to(m.dtype))
        found = of_receiver, of_sender, of_weight, of_biases[0], of_weights, of_biases[1:]
        return None, None, None, None, *(part.to(weights.dtype) for part in found)


class SortedMessages(torch.autograd.Function):
    """The same of a padded batch, whose edges are sorted by target.

    Further args of `apply`, behind `target`: target_starts (N + 1,), source_order (E,) and source_starts
    (N + 1,), as in `Batch`. The other layers' weights (d, d) stand in a row, and then their biases (d,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        edges: Tensor,
        m: Tensor,
        source: Tensor,
        target: Tensor,
        target_starts: Tensor,
        source_order: Tensor,
        source_starts: Tensor,
        receiver: Tensor,
        sender: Tensor,
        weight: Tensor,
        bias: Tensor,
        *others: Tensor,
    ) -> Tensor:
        """See the class."""
        weights, biases = others[: len(others) // 2], others[len(others) // 2 :]
        # Of the activations, in one piece each.
        inputs = receiver.new_empty(len(weights) + 1, len(edges), receiver.shape[1])
        outputs = torch.empty_like(inputs)
        torch.mm(edges, weight.T, out=inputs[0])
        inputs[0] += (receiver + bias).index_select(0, target)
        inputs[0] += sender.index_select(0, source)
        aten.silu.out(inputs[0], out=outputs[0])
        for layer, (matrix, shift) in enumerate(zip(weights, biases, strict=True), start=1):
            torch.addmm(shift, outputs[layer - 1], matrix.T, out=inputs[layer])
            aten.silu.out(inputs[layer], out=outputs[layer])
        constants = edges, m, target, target_starts, source_order, source_starts
        ctx.save_for_backward(*constants, inputs, outputs, *weights)
        return segment_sums(outputs[-1] * m[:, None], target_starts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all but the constants."""
        edges, m, target, target_starts, source_order, source_starts, *rest = ctx.saved_tensors
        inputs, outputs, *weights = rest
        (of_received,) = gradients
        of_inputs = torch.empty_like(inputs)
        of_output = (of_received.index_select(0, target) * m[:, None]).to(inputs.dtype)
        for layer in range(len(weights), 0, -1):
            aten.silu_backward.grad_input(of_output, inputs[layer], grad_input=of_inputs[layer])
            of_output = of_inputs[layer] @ weights[layer - 1]
        aten.silu_backward.grad_input(of_output, inputs[0], grad_input=of_inputs[0])
        of_weights = [before.T @ active for before, active in zip(of_inputs[1:], outputs[:-1], strict=True)]
        of_bias, *of_biases = of_inputs.sum(1)
        first = of_inputs[0].to(m.dtype)
        of_receiver = segment_sums(first, target_starts).to(inputs.dtype)
        of_sender = segment_sums(first.index_select(0, source_order), source_starts).to(inputs.dtype)
        of_weight = of_inputs[0].T @ edges
        return *(None,) * 7, of_receiver, of_sender, of_weight, of_bias, *of_weights, *of_biases


def segment_sums(rows: Tensor, starts: Tensor) -> Tensor:
    """Sums (N, d) of rows starts[n]:starts[n + 1] of (R, d), in that order; none behind the last start."""
    return torch.segment_reduce(rows, "sum", offsets=starts, axis=0, unsafe=True, initial=0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right (a, b) of (E, a) and (E, b)."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right


def _piece(edges: Tensor) -> int:
    """Edges that go through the layers together: all of them on a GPU."""
    return len(edges) if edges.is_cuda else min(EDGES, len(edges))


def _pieces(target: Tensor, *space: Tensor) -> Any:
    """Slices of the edges, with their targets and as many rows of each workspace."""
    size = len(space[0])
    for start in range(0, len(target), size or 1):
        to = target[start : start + size]
        yield slice(start, start + len(to)), to, *(rows[: len(to)] for rows in space)
