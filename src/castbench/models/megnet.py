"""MEGNet: a graph network of atoms, bonds and a state of the crystal.

Chen et al., Chem. Mater. 31, 3564 (2019). Sizes and details follow the reference's defaults: 167,761
parameters with the head for its 95 elements, 168,145 for 119. The state starts as two zeros.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.batch import Batch, rows_at, segments, sums_of
from castbench.models.elements import N_ELEMENTS
from castbench.models.heads import dense
from castbench.models.structure import StructureEncoder, gaussians, weighted_mean

LAST_CENTRE, N_BASIS, BASIS_WIDTH = 5.0, 100, 0.5  # angstrom: the distance basis, from 0
EMBEDDING = 16
N_STATE = 2
LOG_2 = math.log(2)


class Dense(nn.Sequential):
    """Linear layers of these sizes, with softplus(x) - log 2 after each."""

    def __init__(self, *sizes: int):
        super().__init__(*(dense(a, b) for a, b in itertools.pairwise(sizes)))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (R, last size)."""
        for layer in self:
            rows = functional.softplus(layer(rows).to(layer.weight.dtype)) - LOG_2
        return rows


class Groups:
    """Crystals that atoms (N,) and bonds (E,) belong to, and how many bonds of the cell each one is (E,)."""

    def __init__(self, batch: Batch):
        self.atom_crystal = segments(batch.node_offsets)
        self.bond_crystal = self.atom_crystal[batch.edge_target]
        self.bonds = batch.edge_multiplicities * batch.multiplicities[batch.edge_target]


class Block(nn.Module):
    """Updates bonds, then atoms from the mean of their bonds, then the state, each with its residual.

    Without `with_state` the state is not updated: after the last block only the crystal vector reads it.
    """

    def __init__(self, hidden: int, width: int, first: bool, with_state: bool):
        super().__init__()
        self.before = None if first else nn.ModuleList(Dense(width, hidden, width) for _ in range(3))
        self.bond = Dense(4 * width, hidden, hidden, width)
        self.atom = Dense(3 * width, hidden, hidden, width)
        self.state = Dense(3 * width, hidden, hidden, width) if with_state else None

    def forward(
        self, atoms: Tensor, bonds: Tensor, states: Tensor, groups: Groups, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms (N, d), bonds (E, d) and states (B, d)."""
        rows = atoms, bonds, states
        if self.before is not None:
            rows = tuple(layers(x) for layers, x in zip(self.before, rows, strict=True))
        v, e, u = rows
        ends = rows_at(v, batch.edge_target), rows_at(v, batch.edge_source)
        e = self.bond(torch.cat([*ends, e, rows_at(u, groups.bond_crystal)], dim=1))
        around = weighted_mean(e, batch.edge_multiplicities, batch.edge_target, len(v))
        v = self.atom(torch.cat([around, v, rows_at(u, groups.atom_crystal)], dim=1))
        if self.state is not None:
            of_bonds = weighted_mean(e, groups.bonds, groups.bond_crystal, batch.n)
            of_atoms = weighted_mean(v, batch.multiplicities, groups.atom_crystal, batch.n)
            states = states + self.state(torch.cat([of_bonds, of_atoms, u], dim=1))
        return atoms + v, bonds + e, states


class Set2Set(nn.Module):
    """Attention over a set, step by step (Vinyals et al. 2016): rows (R, n_in) to vectors (B, 2 width)."""

    def __init__(self, n_in: int, width: int, steps: int):
        super().__init__()
        self.width, self.steps = width, steps
        self.project = dense(n_in, width)
        self.gates = dense(2 * width, 4 * width)
        nn.init.orthogonal_(self.gates.weight)
        nn.init.ones_(self.gates.bias[width : 2 * width])  # the forget gate

    def forward(self, rows: Tensor, weights: Tensor, groups: Tensor, n: int) -> Tensor:
        """Vectors (n, 2 width) of the groups (R,) of rows; row r counts weights[r] times."""
        memory = self.project(rows)
        cell = memory.new_zeros(n, self.width)
        found = memory.new_zeros(n, 2 * self.width)
        for _ in range(self.steps):
            enter, keep, value, leave = self.gates(found).chunk(4, dim=1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * value.tanh()
            query = leave.sigmoid() * cell.tanh()
            scores = (memory * rows_at(query, groups)).sum(dim=1) + weights.log()
            highest = scores.new_full((n,), -torch.inf).scatter_reduce(0, groups, scores.detach(), "amax")
            share = (scores - highest[groups]).exp()
            share = share / sums_of(share, groups, n)[groups]
            read = sums_of(memory * share[:, None], groups, n)
            found = torch.cat([query, read], dim=1)
        return found


class MEGNet(StructureEncoder):
    """MEGNet; its crystal vector is made of Set2Set over atoms and over bonds, and the state."""

    name = "megnet"
    centres: Tensor

    def __init__(self, width: int, hidden: int, blocks: int, vector: int, passes: int, pooled: bool = True):
        super().__init__(width, vector)
        self.register_buffer("centres", torch.linspace(0, LAST_CENTRE, N_BASIS), persistent=False)
        self.embedding = nn.Embedding(N_ELEMENTS + 1, EMBEDDING)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        self.atom_input = Dense(EMBEDDING, hidden, width)
        self.bond_input = Dense(N_BASIS, hidden, width)
        self.state_input = Dense(N_STATE, hidden, width)
        self.state_input[0].weight.requires_grad_(False)  # of zeros, as in the reference
        self.blocks = nn.ModuleList(
            Block(hidden, width, i == 0, pooled or i + 1 < blocks) for i in range(blocks)
        )
        if pooled:
            self.pool_atoms, self.pool_bonds = (Set2Set(width, vector, passes) for _ in range(2))
            self.pool = Dense(4 * vector + width, width, vector)

    def _run(self, batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Groups]:
        groups = Groups(batch)
        atoms = self.hide(self.atom_input(self.embedding(batch.atomic_numbers - 1)), batch, hidden)
        bonds = self.bond_input(gaussians(batch.distances, self.centres, BASIS_WIDTH**2))
        states = self.state_input(atoms.new_zeros(batch.n, N_STATE))
        for block in self.blocks:
            atoms, bonds, states = block(atoms, bonds, states, groups, batch)
        return atoms, bonds, states, groups

    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); see `StructureEncoder`."""
        return self._run(batch, hidden)[0]

    def forward(self, batch: Batch) -> Tensor:
        """Crystal vectors (B, vector)."""
        atoms, bonds, states, groups = self._run(batch, None)
        vectors = [
            self.pool_atoms(atoms, batch.multiplicities, groups.atom_crystal, batch.n),
            self.pool_bonds(bonds, groups.bonds, groups.bond_crystal, batch.n),
            states,
        ]
        return self.pool(torch.cat(vectors, dim=1))
