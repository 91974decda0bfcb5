"""The small layers that models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Exact(nn.Linear):
    """A model's last layer, in the type of its weights; under autocast 8 of 24 bits would be left."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def dense(n_in: int, n_out: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer with Glorot-uniform weights and zero bias, as coGN's (Keras) and the transformer's."""
    layer = kind(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def product_type(states: Tensor) -> torch.dtype:
    """Type in which products with `states` are taken: that of autocast, where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class Regression(nn.Sequential):
    """One linear layer (B, d) -> (B,): the paper's regression block (CAST, 4.3.1)."""

    def __init__(self, width: int):
        super().__init__(dense(width, 1, Exact))

    def forward(self, pooled: Tensor) -> Tensor:
        """Standardised predictions (B,)."""
        return super().forward(pooled).squeeze(-1)


class ProjectionHead(nn.Module):
    """CrysMMNet's projection of one modality, (B, n_in) -> (B, width): two layers, residual, LayerNorm."""

    def __init__(self, n_in: int, width: int, dropout: float):
        super().__init__()
        self.project = dense(n_in, width)
        self.refine = dense(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Projected vectors (B, width)."""
        projected = self.project(x)
        return self.norm(projected + self.dropout(self.refine(functional.gelu(projected))))
