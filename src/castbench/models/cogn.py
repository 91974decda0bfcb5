"""coGN, the structure encoder: message passing on the asymmetric unit.

Ruff et al., Digital Discovery 3, 594 (2024). Sizes and details follow the reference's Matbench settings:
697,601 parameters with the head at width 128 and depth 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.utils import scatter

from castbench.models.base import Network
from castbench.models.batch import Batch, segments
from castbench.models.elements import N_ELEMENTS, element_facts
from castbench.models.heads import Regression, dense
from castbench.models.messages import Messages

CUTOFF = 8.0  # angstrom, the last centre of the distance basis
N_BASIS = 32
N_HIDDEN = 4  # layers of the message network after its first


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
        weights = torch.stack([layer.weight for layer in hidden])
        biases = torch.stack([layer.bias for layer in hidden])
        kind = to_receiver.dtype  # that of autocast, where it is on
        received = Messages.apply(
            basis.to(kind), batch.edge_multiplicities, batch.edge_source, batch.edge_target,
            to_receiver, to_sender, weight.to(kind), bias.to(kind), weights.to(kind), biases.to(kind),
        )  # fmt: skip
        return nodes + functional.silu(self.update(received))


class CoGN(nn.Module):
    """Structure encoder: crystal graphs to node states (N, width) and crystal vectors (B, width)."""

    facts: Tensor
    centres: Tensor

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.width = width
        facts = torch.from_numpy(element_facts())
        self.register_buffer("facts", facts, persistent=False)  # (118, 18)
        self.register_buffer("centres", torch.linspace(0, CUTOFF, N_BASIS + 1)[1:], persistent=False)
        self.embedding = nn.Embedding(N_ELEMENTS + 1, width)  # the reference's table has a row to spare
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        self.node_input = dense(width + facts.shape[1], width)
        self.edge_input = dense(N_BASIS, width)
        self.blocks = nn.ModuleList(MessageBlock(width) for _ in range(depth))

    def basis(self, distances: Tensor) -> Tensor:
        """Gaussians (E, 32) of distances (E,) in angstrom; their variance is the spacing of the centres."""
        spacing = CUTOFF / N_BASIS
        return torch.exp((distances[:, None] - self.centres).square() / (-2 * spacing))

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); `hidden` (width,) replaces the whole input of `batch.masked_nodes`."""
        elements = self.node_input(torch.cat([self.embedding.weight[:N_ELEMENTS], self.facts], dim=1))
        states = elements.index_select(0, batch.atomic_numbers - 1)
        if hidden is not None:
            states = torch.where(batch.masked_nodes[:, None], hidden, states)
        basis = self.basis(batch.distances)
        for block in self.blocks:
            states = block(states, basis, self.edge_input, batch)
        return states

    def readout(self, nodes: Tensor, batch: Batch) -> Tensor:
        """Mean (B, width) of node states (N, width), weighted by the number of atoms they stand for."""
        crystal, weight = segments(batch.node_offsets), batch.multiplicities
        total = scatter(nodes * weight[:, None], crystal, dim_size=batch.n, reduce="sum")
        return total / scatter(weight, crystal, dim_size=batch.n, reduce="sum")[:, None]

    def forward(self, batch: Batch) -> Tensor:
        """Crystal vectors (B, width)."""
        return self.readout(self.nodes(batch), batch)


class StructureOnly(Network):
    """coGN with its linear head; reads no text."""

    def __init__(self, architecture: dict[str, Any], encoder: Path | None = None):
        super().__init__(cogn=CoGN(**architecture["cogn"]))
        self.head = Regression(self.cogn.width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        return self.head(self.cogn(batch))
