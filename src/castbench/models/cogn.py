"""coGN: message passing on the asymmetric unit.

Ruff et al., Digital Discovery 3, 594 (2024). Sizes and details follow the reference's Matbench settings:
697,601 parameters with the head at width 128 and depth 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench import kernels
from castbench.models.batch import Batch
from castbench.models.elements import N_ELEMENTS, element_facts
from castbench.models.heads import dense, product_type
from castbench.models.messages import Messages, SortedMessages
from castbench.models.structure import StructureEncoder, gaussians

CUTOFF = 8.0  # angstrom, the last centre of the distance basis
N_BASIS = 32
N_HIDDEN = 4  # layers of the message network after its first
KERNEL_WIDTHS = (16, 32, 64, 128)  # that the GPU's kernels take


class MessageBlock(nn.Module):
    """One round of messages; equal in function to an MLP on the concatenation of edge, receiver and sender.

    The first layer of that MLP is linear before its activation: its receiver and sender parts are computed
    once a node, not once an edge, and its edge part is joined with the edge input layer.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = dense(3 * width, width)  # columns: edge, receiver, sender
        self.hidden = nn.ModuleList(dense(width, width) for _ in range(N_HIDDEN))
        self.update = dense(width, width)

    def forward(self, nodes: Tensor, basis: Tensor, edge_input: nn.Linear, batch: Batch) -> Tensor:
        """Node states (N, d) after the messages along edges with distance basis (E, 32)."""
        edge, receiver, sender = self.first.weight.chunk(3, dim=1)
        weight = edge @ edge_input.weight
        bias = self.first.bias + edge @ edge_input.bias
        to_receiver, to_sender = functional.linear(nodes, receiver), functional.linear(nodes, sender)
        hidden: list[Any] = list(self.hidden)
        weights, biases = [layer.weight for layer in hidden], [layer.bias for layer in hidden]
        kind = to_receiver.dtype  # that of autocast, where it is on
        graph = basis.to(kind), batch.edge_multiplicities, batch.edge_source, batch.edge_target
        own = to_receiver, to_sender, weight.to(kind), bias.to(kind)
        if batch.edge_starts is None:
            others = torch.stack(weights).to(kind), torch.stack(biases).to(kind)
            received = Messages.apply(*graph, *own, *others)
        else:
            order = batch.edge_starts, batch.source_order, batch.source_starts
            others = [part.to(kind) for part in weights + biases]
            received = SortedMessages.apply(*graph, *order, *own, *others)
        return nodes + functional.silu(self.update(received))


class ElementInput(nn.Module):
    """coGN's node input: a learned embedding of the element and facts about it, through a linear layer."""

    facts: Tensor
    numbers: Tensor

    def __init__(self, width: int):
        super().__init__()
        facts = torch.from_numpy(element_facts())
        self.register_buffer("facts", facts, persistent=False)  # (118, 18)
        self.register_buffer("numbers", torch.arange(1, N_ELEMENTS + 1), persistent=False)
        self.embedding = nn.Embedding(N_ELEMENTS + 1, width)  # the reference's table has a row to spare
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        self.linear = dense(width + facts.shape[1], width)

    def forward(self, batch: Batch) -> Tensor:
        """States (N, width)."""
        elements = self.linear(torch.cat([self.embedding.weight[:N_ELEMENTS], self.facts], dim=1))
        chosen = batch.atomic_numbers[:, None] == self.numbers
        return chosen.to(elements.dtype) @ elements  # for a product's gradient adds in a fixed order


class CoGN(StructureEncoder):
    """coGN; `pooled` makes no difference, since the crystal vector is the mean of the nodes."""

    name = "cogn"
    takes_padded = True
    centres: Tensor

    def __init__(self, width: int, depth: int, pooled: bool = True):
        super().__init__(width, width)
        self.register_buffer("centres", torch.linspace(0, CUTOFF, N_BASIS + 1)[1:], persistent=False)
        self.node_input = ElementInput(width)
        self.edge_input = dense(N_BASIS, width)
        self.blocks = nn.ModuleList(MessageBlock(width) for _ in range(depth))

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); see `StructureEncoder`."""
        states = self.hide(self.node_input(batch), batch, hidden)
        basis = gaussians(batch.distances, self.centres, 2 * CUTOFF / N_BASIS)
        kind = product_type(basis)
        fits = batch.sizes is not None and self.width in KERNEL_WIDTHS
        if fits and kernels.usable("cogn", states.device, kind):
            return self.rounds_together(states, basis, batch, kind)
        for block in self.blocks:
            states = block(states, basis, self.edge_input, batch)
        return states

    def rounds_together(self, states: Tensor, basis: Tensor, batch: Batch, kind: torch.dtype) -> Tensor:
        """Node states (N, width) after all rounds of a padded batch, by kernels for the GPU."""
        from castbench.kernels.cogn import Rounds  # imports triton, which is not everywhere

        blocks: list[Any] = list(self.blocks)
        first = torch.stack([block.first.weight for block in blocks])
        hidden = torch.stack([layer.weight for block in blocks for layer in block.hidden])
        update = torch.stack([block.update.weight for block in blocks])
        layers = (layer for block in blocks for layer in (block.first, *block.hidden, block.update))
        biases = torch.stack([layer.bias for layer in layers])
        return Rounds.apply(
            states, basis, batch.edge_multiplicities, batch.edge_source, batch.edge_target,
            batch.edge_starts, batch.source_order, batch.source_starts, kind,
            self.edge_input.weight, self.edge_input.bias,
            first, hidden.unflatten(0, (len(blocks), -1)), update, biases.unflatten(0, (len(blocks), -1)),
        )  # fmt: skip
