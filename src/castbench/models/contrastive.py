"""MultiMat: contrastive pretraining of the structure encoder against text (Moro et al. 2024; CAST, 4.3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.base import Network, Outcome
from castbench.models.batch import Batch, gathered, widened
from castbench.models.heads import dense
from castbench.models.structure import StructureOnly, build_structure_encoder
from castbench.models.text import TextEncoder


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Outcome:
    """Symmetric InfoNCE of paired vectors (B, d): each row has to find its partner among the other rows."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = (functional.normalize(widened(x), dim=1) for x in (a, b))
        similarity = a @ b.T / temperature
    partner = torch.arange(len(a), device=a.device)
    loss = (
        functional.cross_entropy(similarity, partner) + functional.cross_entropy(similarity.T, partner)
    ) / 2
    hits = (similarity.argmax(dim=1) == partner).sum() + (similarity.argmax(dim=0) == partner).sum()
    return Outcome(loss, hits / 2, partner.new_full((), len(a)))


class ContrastivePretraining(Network):
    """The crystal vector against an MLP on the [CLS] state of the frozen text encoder, in one space."""

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        text = TextEncoder(encoder, lora=None, pooled=True)
        super().__init__(build_structure_encoder(architecture), text)
        hidden = architecture["contrastive"]["hidden"]
        self.temperature: float = architecture["contrastive"]["temperature"]
        self.project_text = nn.Sequential(
            dense(self.text.width, hidden),
            nn.ReLU(),
            dense(hidden, hidden),
            nn.ReLU(),
            dense(hidden, self.structure.vector_width),
        )

    def forward(self, batch: Batch) -> Outcome:
        """Loss over the batch, also a shared one; `correct` is the mean of crystals that find their text, and
        the reverse.
        """
        crystals, texts = self.structure(batch), self.project_text(self.text.cls(batch))
        if batch.place is not None:  # the partners of other processes are candidates too
            crystals, texts = gathered(crystals, batch.place), gathered(texts, batch.place)
        return info_nce(crystals, texts, self.temperature)


class MultiMat(StructureOnly):
    """A structure encoder that starts from contrastive pretraining, with a linear head; reads no text."""

    pretrained = ("structure",)
