"""What models of compositions share: their batch, and heads for any number of targets.

Shapes: B compositions, L element slots of the longest one in the batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castbench.models.base import Network
from castbench.models.heads import Exact, dense


@dataclass(slots=True)
class CompositionBatch:
    """Packed compositions of a batch."""

    numbers: Tensor  # (B, L) int64 atomic numbers, 0 at padding
    fractions: Tensor  # (B, L) float32 atomic fractions, 0 at padding

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, True at elements."""
        return self.numbers > 0


class Compositions:
    """Packed compositions as a source of batches, trimmed to the longest formula of each.

    Args:
        numbers: (n, slots) uint8.
        fractions: (n, slots) float32.
        device: of the batches.
    """

    def __init__(self, numbers: Tensor, fractions: Tensor, device: torch.device):
        self.device = device
        self.numbers, self.fractions = numbers.to(device), fractions.to(device)
        self.lengths = (numbers > 0).sum(dim=1)

    def batch(self, rows: Tensor) -> CompositionBatch:
        """The compositions `rows` (B,), given on the host."""
        longest, rows = int(self.lengths[rows].max()), rows.to(self.device)
        return CompositionBatch(self.numbers[rows, :longest].long(), self.fractions[rows, :longest])


class CompositionNetwork(Network):
    """Maps a batch to {target: (B,)}: standardised values of regressions, logits of classifications."""

    def __init__(self, targets: list[str], task_weights: str):
        super().__init__()
        self.targets = targets
        # log sigma^2 of each task (Kendall et al. 2018); only in the network where they are learned.
        self.log_variances = nn.Parameter(torch.zeros(len(targets))) if task_weights == "learned" else None


class TargetHeads(nn.ModuleDict):
    """One head a target on the shared features (B, width): linear, GELU, dropout, linear to a number."""

    def __init__(self, targets: list[str], width: int, hidden: int, dropout: float):
        super().__init__(
            {
                target: nn.Sequential(
                    dense(width, hidden), nn.GELU(), nn.Dropout(dropout), dense(hidden, 1, Exact)
                )
                for target in targets
            }
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """{target: (B,)}."""
        return {target: head(features).squeeze(-1) for target, head in self.items()}
