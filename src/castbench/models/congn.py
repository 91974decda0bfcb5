"""coNGN: coGN whose messages to one atom see each other through the angles between them.

Ruff et al., Digital Discovery 3, 594 (2024), on edges of a Voronoi tessellation. Sizes and details follow the
reference's Matbench settings: 2,799,201 parameters with the head at width 160 and depth 5.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.batch import ABSENT, Batch, rows_at, sums_of
from castbench.models.cogn import CUTOFF, N_BASIS, ElementInput
from castbench.models.heads import dense
from castbench.models.structure import StructureEncoder, edges_into, gaussians

MAX_AREA = 30.0  # square angstrom, the last centre of the basis of ridge areas
MAX_ANGLE, N_ANGLES = 3.2, 16  # radians; centres of the basis of angles


def layers_of(n_in: int, width: int, layers: int) -> nn.Sequential:
    """Linear layers with swish after each, the first from `n_in` numbers."""
    sizes = [n_in, *[width] * layers]
    parts = [(dense(a, b), nn.SiLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(module for part in parts for module in part))


def join(layers: nn.Sequential, features: Tensor, states: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
    """Output (P, d) of `layers` on features (P, f) ++ states (R, d) of the receiver ++ those of the sender.

    The first layer's parts for receiver and sender are computed once a row of `states`.
    """
    first: Any = layers[0]
    width = states.shape[1]
    of_features, of_receiver, of_sender = first.weight.split([features.shape[1], width, width], dim=1)
    joined = functional.linear(features, of_features, first.bias)
    joined = joined + rows_at(functional.linear(states, of_receiver), receiver)
    joined = joined + rows_at(functional.linear(states, of_sender), sender)
    return layers[1:](joined)


class NestedBlock(nn.Module):
    """A round of messages: computed, refined along pairs of edges that share their receiver, and summed."""

    def __init__(self, width: int):
        super().__init__()
        self.message = layers_of(3 * width, width, 4)
        self.update = layers_of(width, width, 4)
        self.pair_message = layers_of(N_ANGLES + 2 * width, width, 2)
        self.gate = nn.GRUCell(width, width)
        nn.init.xavier_uniform_(self.gate.weight_ih)
        nn.init.orthogonal_(self.gate.weight_hh)
        nn.init.zeros_(self.gate.bias_ih)
        nn.init.zeros_(self.gate.bias_hh)
        self.pair_update = layers_of(width, width, 2)

    def forward(
        self, nodes: Tensor, edges: Tensor, angles: Tensor, pairs: tuple[Tensor, Tensor], batch: Batch
    ) -> Tensor:
        """Node states (N, d) after the messages along edges (E, d); pairs (P,), (P,) with angles (P, 16)."""
        messages = join(self.message, edges, nodes, batch.edge_target, batch.edge_source)
        receiver, sender = pairs
        seen = join(self.pair_message, angles, messages, receiver, sender)
        seen = sums_of(seen, receiver, len(messages))
        messages = self.gate(self.pair_update(seen), messages)
        received = sums_of(messages, batch.edge_target, len(nodes))
        return nodes + self.update(received)


class CoNGN(StructureEncoder):
    """coNGN; its crystal vector is the mean of the nodes through one layer."""

    name = "congn"
    distance_centres: Tensor
    area_centres: Tensor
    angle_centres: Tensor

    def __init__(self, width: int, depth: int, pooled: bool = True):
        super().__init__(width, width)
        for name, last, n in (
            ("distance", CUTOFF, N_BASIS),
            ("area", MAX_AREA, N_BASIS),
            ("angle", MAX_ANGLE, N_ANGLES),
        ):
            self.register_buffer(f"{name}_centres", torch.linspace(0, last, n + 1)[1:], persistent=False)
        self.node_input = ElementInput(width)
        self.edge_input = dense(2 * N_BASIS, width)
        self.blocks = nn.ModuleList(NestedBlock(width) for _ in range(depth))
        self.pool = layers_of(width, width, 1) if pooled else ABSENT

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); see `StructureEncoder`."""
        states = self.hide(self.node_input(batch), batch, hidden)
        basis = [
            gaussians(batch.distances, self.distance_centres, 2 * CUTOFF / N_BASIS),
            gaussians(batch.ridge_areas, self.area_centres, 2 * MAX_AREA / N_BASIS),
        ]
        edges = self.edge_input(torch.cat(basis, dim=1))
        receiver, sender = edges_into(batch.edge_target, batch.edge_target, len(states))
        others = receiver != sender
        pairs = receiver[others], sender[others]
        a, b = batch.vectors[pairs[0]], batch.vectors[pairs[1]]
        angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(dim=1))
        angles = gaussians(angle, self.angle_centres, 2 * MAX_ANGLE / N_ANGLES)
        for block in self.blocks:
            states = block(states, edges, angles, pairs, batch)
        return states

    def forward(self, batch: Batch) -> Tensor:
        """Crystal vectors (B, width)."""
        return self.pool(self.readout(self.nodes(batch), batch))
