"""Structure encoders: what they have in common, the choice among them, and one alone as a model.

Every encoder works on the asymmetric unit (graphs/kinds.py): a node stands for `multiplicities` atoms of the
crystal, an edge for `edge_multiplicities` equal ones. Sums over a node's edges, means over atoms and the
statistics of batch normalisation count them, so that all values are those of the whole cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # not imported with torch
from torch import Tensor, distributed, nn

from castbench import kernels
from castbench.models.base import Network
from castbench.models.batch import Batch, segments, sums_of
from castbench.models.heads import Regression
from castbench.models.messages import segment_sums

# name, which is also that of its section of sizes -> where its constructor (sizes, pooled) is
ENCODERS = {
    "cogn": "cogn:CoGN",
    "congn": "congn:CoNGN",
    "alignn": "alignn:ALIGNN",
    "cgcnn": "cgcnn:CGCNN",
    "megnet": "megnet:MEGNet",
}


def build_structure_encoder(architecture: dict[str, Any], pooled: bool = True) -> StructureEncoder:
    """The encoder whose section `architecture` has, with random new weights.

    Without `pooled` it lacks what it needs for crystal vectors alone, so that all of it is trained.
    """
    (name,) = architecture.keys() & ENCODERS.keys()
    module, constructor = ENCODERS[name].split(":")
    return getattr(import_module(f"castbench.models.{module}"), constructor)(
        **architecture[name], pooled=pooled
    )


class StructureEncoder(nn.Module, ABC):
    """Crystal graphs to node states (N, width) and crystal vectors (B, vector_width).

    A crystal vector has passed through all layers of the published model but its last, which is linear.
    """

    name: str  # in `ENCODERS`
    takes_padded = False  # see `Network`

    def __init__(self, width: int, vector_width: int):
        super().__init__()
        self.width, self.vector_width = width, vector_width

    @abstractmethod
    def nodes(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Node states (N, width); `hidden` (width,) replaces the whole input of `batch.masked_nodes`."""

    def forward(self, batch: Batch) -> Tensor:
        """Crystal vectors (B, vector_width)."""
        return self.readout(self.nodes(batch), batch)

    def readout(self, nodes: Tensor, batch: Batch) -> Tensor:
        """Mean (B, d) of node states (N, d), weighted by the number of atoms they stand for."""
        if batch.shares is not None:
            if kernels.usable("readout", nodes.device):
                from castbench.kernels.readout import readout

                return readout(nodes, batch.shares, batch.node_offsets)
            return segment_sums(nodes * batch.shares[:, None], batch.node_offsets[: batch.n + 1])
        return weighted_mean(nodes, batch.multiplicities, segments(batch.node_offsets), batch.n)

    def hide(self, states: Tensor, batch: Batch, hidden: Tensor | None) -> Tensor:
        """States (N, d) with `hidden` (d,) in the place of those of masked nodes.

        In the type of the weights, to which rounds of messages add what they found.
        """
        states = states.to(next(self.parameters()).dtype)
        return states if hidden is None else torch.where(batch.masked_nodes[:, None], hidden, states)


def gaussians(values: Tensor, centres: Tensor, spread: float) -> Tensor:
    """exp(-(x - centre)^2 / spread) of values x (R,) at centres (K,), (R, K)."""
    return torch.exp((values[:, None] - centres).square() / -spread)


def weighted_mean(values: Tensor, weights: Tensor, groups: Tensor, n: int) -> Tensor:
    """Mean (n, d) of the values (R, d) of each group, with weights (R,); 0 for a group without values."""
    total = sums_of(values * weights[:, None], groups, n)
    return total / sums_of(weights, groups, n).clamp(min=1e-12)[:, None]


def edges_into(edge_target: Tensor, at: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """All pairs (row of `at`, edge into the node at[row]), both (P,), by row.

    Args:
        edge_target: (E,) nodes that edges lead to.
        at: (R,) nodes.
        n: number of nodes.
    """
    order = edge_target.argsort(stable=True)
    degree = torch.bincount(edge_target, minlength=n)
    first, counts = (degree.cumsum(0) - degree)[at], degree[at]
    row = torch.repeat_interleave(counts)
    shift = first - (counts.cumsum(0) - counts)
    return row, order[torch.arange(len(row), device=row.device) + shift[row]]


def over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over the processes that train together, with its gradient."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.nn.functional.all_reduce(value)
    return value


class WeightedBatchNorm(nn.Module):
    """Batch normalisation of rows (R, d) that count `weights` (R,) times each: that of the rows spelled out.

    Rows without weight are normalised with the others' statistics. Where several processes share a batch,
    the statistics are those of the whole batch.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Normalised rows (R, d), of their type; statistics are taken in float32."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.normalised(rows.to(self.weight.dtype), weights).to(rows.dtype)

    def normalised(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Normalised rows (R, d), of the statistics' type."""
        mean, variance = self.running_mean, self.running_var
        if self.training:
            total = over_processes(weights.sum())
            share = weights / total.clamp(min=1e-12)
            mean = over_processes(share @ rows)
            variance = over_processes(share @ (rows - mean).square())
            with torch.no_grad():
                momentum = self.momentum * (total > 0)
                unbiased = variance * total / (total - 1).clamp(min=1.0)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(unbiased, momentum)
        return (rows - mean) * ((variance + self.eps).rsqrt() * self.weight) + self.bias


class StructureOnly(Network):
    """A structure encoder with its linear head; reads no text."""

    def __init__(self, architecture: dict[str, Any], encoder: Path | None = None):
        super().__init__(structure=build_structure_encoder(architecture))
        self.head = Regression(self.structure.vector_width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        return self.head(self.structure(batch))
