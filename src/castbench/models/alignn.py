"""ALIGNN: message passing on atoms and bonds, and on the line graph of bonds and angles.

Choudhary and DeCost, npj Comput. Mater. 7, 185 (2021). Sizes and details follow the reference's defaults:
4,026,753 parameters with the head at width 256, 4 ALIGNN and 4 graph-convolution layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.batch import Batch, rows_at, sums_of
from castbench.models.elements import element_categories
from castbench.models.structure import StructureEncoder, WeightedBatchNorm, edges_into, gaussians

CUTOFF, N_DISTANCES = 8.0, 80  # angstrom, the last centre of the distance basis
N_COSINES = 40  # centres from -1 to 1


class Dense(nn.Module):
    """A linear layer, batch normalisation, SiLU."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(n_in, n_out), WeightedBatchNorm(n_out)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows (R, n_out); row r counts weights[r] times."""
        return functional.silu(self.norm(self.linear(rows), weights))


class EdgeGatedConv(nn.Module):
    """Edge-gated graph convolution with residuals (Bresson and Laurent 2017; Dwivedi et al. 2020).

    The edges of the last layers are read by nobody: without `last` they are updated too.
    """

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.last = last
        self.source_gate, self.target_gate, self.edge_gate = (nn.Linear(width, width) for _ in range(3))
        self.edge_norm = WeightedBatchNorm(width)
        self.own, self.neighbour = nn.Linear(width, width), nn.Linear(width, width)
        self.node_norm = WeightedBatchNorm(width)
        if last:  # counted among the published parameters, and idle there as well
            self.edge_norm.requires_grad_(False)

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        ends: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Nodes (N, d), edges (E, d); `ends`: source and target (E,); `weights`: of nodes and of edges."""
        source, target = ends
        gate = self.edge_gate(edges) + rows_at(self.source_gate(nodes), source)
        gate = gate + rows_at(self.target_gate(nodes), target)
        share = torch.sigmoid(gate)
        sent = share * rows_at(self.neighbour(nodes), source)
        received = sums_of(sent, target, len(nodes)) / (sums_of(share, target, len(nodes)) + 1e-6)
        updated = nodes + functional.silu(self.node_norm(self.own(nodes) + received, weights[0]))
        if self.last:
            return updated, edges
        return updated, edges + functional.silu(self.edge_norm(gate, weights[1]))


class ALIGNN(StructureEncoder):
    """ALIGNN; `pooled` makes no difference, since the crystal vector is the mean of the nodes.

    A bond from u to v is updated by all bonds into u. On the asymmetric unit the bonds into u are those of
    the node that u is a copy of, and the bond itself, seen from there, is the edge `edge_reverse`.
    """

    name = "alignn"
    categories: Tensor
    distance_centres: Tensor
    cosine_centres: Tensor

    def __init__(self, width: int, embedding: int, alignn_layers: int, gcn_layers: int, pooled: bool = True):
        super().__init__(width, width)
        categories = torch.from_numpy(element_categories())  # (118, 92)
        self.register_buffer("categories", categories, persistent=False)
        self.register_buffer("distance_centres", torch.linspace(0, CUTOFF, N_DISTANCES), persistent=False)
        self.register_buffer("cosine_centres", torch.linspace(-1, 1, N_COSINES), persistent=False)
        self.atom_input = Dense(categories.shape[1], width)
        self.bond_input = nn.ModuleList([Dense(N_DISTANCES, embedding), Dense(embedding, width)])
        self.angle_input = nn.ModuleList([Dense(N_COSINES, embedding), Dense(embedding, width)])
        self.alignn_layers = nn.ModuleList(
            nn.ModuleList([EdgeGatedConv(width, False), EdgeGatedConv(width, i + 1 == alignn_layers)])
            for i in range(alignn_layers)
        )
        self.gcn_layers = nn.ModuleList(EdgeGatedConv(width, i + 1 == gcn_layers) for i in range(gcn_layers))

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); see `StructureEncoder`."""
        ends = batch.edge_source, batch.edge_target
        bond, other = edges_into(batch.edge_target, batch.edge_source, len(batch.atomic_numbers))
        atom_weights = batch.multiplicities
        bond_weights = atom_weights[batch.edge_target]
        angle_weights = bond_weights[bond]
        cosines = torch.cosine_similarity(
            batch.vectors[batch.edge_reverse][bond], batch.vectors[other], dim=1
        ).clamp(-1, 1)
        shown = atom_weights if hidden is None else atom_weights * ~batch.masked_nodes
        atoms = self.atom_input(self.categories[batch.atomic_numbers - 1], shown)
        atoms = self.hide(atoms, batch, hidden)
        bonds = gaussians(batch.distances, self.distance_centres, CUTOFF / (N_DISTANCES - 1))
        for layer in self.bond_input:
            bonds = layer(bonds, bond_weights)
        angles = gaussians(cosines, self.cosine_centres, 2 / (N_COSINES - 1))
        for layer in self.angle_input:
            angles = layer(angles, angle_weights)
        layers: list[Any] = list(self.alignn_layers)
        for on_atoms, on_bonds in layers:
            atoms, bonds = on_atoms(atoms, bonds, ends, (atom_weights, bond_weights))
            bonds, angles = on_bonds(bonds, angles, (other, bond), (bond_weights, angle_weights))
        for layer in self.gcn_layers:
            atoms, bonds = layer(atoms, bonds, ends, (atom_weights, bond_weights))
        return atoms
