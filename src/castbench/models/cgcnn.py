"""CGCNN: crystal graph convolutional network (Xie and Grossman, Phys. Rev. Lett. 120, 145301, 2018).

Sizes and details follow the reference's defaults: 80,833 parameters with the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.batch import ABSENT, Batch, rows_at, sums_of
from castbench.models.elements import element_categories
from castbench.models.structure import StructureEncoder, WeightedBatchNorm, gaussians

CUTOFF, STEP = 8.0, 0.2  # angstrom: centres of the distance basis, whose width is the step
N_BASIS = 41


class GatedConv(nn.Module):
    """softplus(h + norm(sum of gate x message)) over the neighbours (the paper's equation 5)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(2 * width + N_BASIS, 2 * width)  # columns: atom, neighbour, bond
        self.message_norm = WeightedBatchNorm(2 * width)
        self.sum_norm = WeightedBatchNorm(width)

    def forward(self, nodes: Tensor, basis: Tensor, batch: Batch) -> Tensor:
        """Node states (N, d) after the messages along edges with distance basis (E, 41)."""
        width = nodes.shape[1]
        atom, neighbour, bond = self.linear.weight.split([width, width, basis.shape[1]], dim=1)
        joined = functional.linear(basis, bond, self.linear.bias)
        joined = joined + rows_at(functional.linear(nodes, atom), batch.edge_target)
        joined = joined + rows_at(functional.linear(nodes, neighbour), batch.edge_source)
        bonds = batch.edge_multiplicities * batch.multiplicities[batch.edge_target]
        gate, message = self.message_norm(joined, bonds).chunk(2, dim=1)
        sent = torch.sigmoid(gate) * functional.softplus(message) * batch.edge_multiplicities[:, None]
        received = sums_of(sent, batch.edge_target, len(nodes))
        return functional.softplus(nodes + self.sum_norm(received, batch.multiplicities))


class CGCNN(StructureEncoder):
    """CGCNN; its crystal vector is the mean of the nodes through one layer of `hidden`."""

    name = "cgcnn"
    categories: Tensor
    centres: Tensor

    def __init__(self, width: int, layers: int, hidden: int, pooled: bool = True):
        super().__init__(width, hidden)
        categories = torch.from_numpy(element_categories())  # (118, 92)
        self.register_buffer("categories", categories, persistent=False)
        self.register_buffer("centres", torch.linspace(0, CUTOFF, N_BASIS), persistent=False)
        self.node_input = nn.Linear(categories.shape[1], width)
        self.layers = nn.ModuleList(GatedConv(width) for _ in range(layers))
        self.pool = nn.Linear(width, hidden) if pooled else ABSENT

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); see `StructureEncoder`."""
        states = self.hide(self.node_input(self.categories[batch.atomic_numbers - 1]), batch, hidden)
        basis = gaussians(batch.distances, self.centres, STEP**2)
        for layer in self.layers:
            states = layer(states, basis, batch)
        return states

    def forward(self, batch: Batch) -> Tensor:
        """Crystal vectors (B, hidden)."""
        pooled = functional.softplus(self.readout(self.nodes(batch), batch))
        return functional.softplus(self.pool(pooled))
