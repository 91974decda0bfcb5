"""CrysMMNet: crystal vector and text vector, projected and concatenated (Das et al., UAI 2023).

Heads and fusion as in the reference. Its structure encoder is ALIGNN; the CAST paper (4.3.2) takes coGN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castbench.models.base import Network
from castbench.models.batch import Batch
from castbench.models.heads import ProjectionHead, Regression, dense
from castbench.models.structure import build_structure_encoder
from castbench.models.text import TextEncoder


class CrysMMNet(Network):
    """Prediction from the structure encoder's crystal vector and the [CLS] state."""

    def __init__(self, architecture: dict[str, Any], encoder: Path, lora: dict[str, Any] | None):
        super().__init__(build_structure_encoder(architecture), TextEncoder(encoder, lora, pooled=True))
        width, dropout = architecture["concat"]["width"], architecture["concat"]["dropout"]
        self.project_structure = ProjectionHead(self.structure.vector_width, width, dropout)
        self.project_text = ProjectionHead(self.text.width, width, dropout)
        self.fuse = nn.Sequential(dense(2 * width, width), nn.ReLU())
        self.head = Regression(width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        return self._predict(batch, self.text.cls(batch))

    def attention_maps(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Predictions (B,) and [CLS]'s attention in each layer that the model runs (B, H, T)."""
        states, maps = self.text.attend(batch)
        return self._predict(batch, states[batch.token_offsets[:-1]]), maps

    def _predict(self, batch: Batch, cls: Tensor) -> Tensor:
        structure, text = self.project_structure(self.structure(batch)), self.project_text(cls)
        return self.head(self.fuse(torch.cat([structure, text], dim=1)))


def crysmmnet_frozen(architecture: dict[str, Any], encoder: Path) -> CrysMMNet:
    """CrysMMNet on the cached states of the frozen text encoder."""
    return CrysMMNet(architecture, encoder, lora=None)


def crysmmnet_lora(architecture: dict[str, Any], encoder: Path) -> CrysMMNet:
    """CrysMMNet with LoRA on the text encoder."""
    return CrysMMNet(architecture, encoder, lora=architecture["lora"])
