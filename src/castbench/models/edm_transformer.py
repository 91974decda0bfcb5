"""The EDM Transformer: gap and stability from the formula alone (EDM report, sections 4 and 5).

The report fixes 12 heads, width 768, [CLS], normalisation after each residual (post-LN), ReLU in the
feed-forward layers, and the poolings. Layers, feed-forward width and dropout are the configuration's. There
is no position: a formula is a set.

Axis suffixes: B compositions, T tokens ([CLS], then elements, padded), H heads, D width, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.compositions.descriptors import (
    FRACTION_WIDTHS,
    LOWEST_FRACTION,
    N_FEATURES,
    element_table,
    frequencies,
)
from castbench.errors import InputError
from castbench.models.attention import attend
from castbench.models.composition import CompositionBatch, CompositionNetwork, TargetHeads
from castbench.models.heads import dense


class Descriptor(nn.Module):
    """Element descriptor matrices (B, L, 466) of a batch: `descriptors.descriptor_matrix` on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.from_numpy(element_table()), persistent=False)
        for scale, width in FRACTION_WIDTHS.items():
            self.register_buffer(scale, torch.from_numpy(frequencies(width)), persistent=False)

    def forward(self, batch: CompositionBatch) -> Tensor:
        """Features (B, L, 466), 0 at padding."""
        x = batch.fractions
        floor = torch.tensor(LOWEST_FRACTION, device=x.device)
        scaled = {"linear": x, "log": 1 - x.clamp(min=LOWEST_FRACTION).log() / floor.log(), "sqrt": x.sqrt()}
        parts = [self.table[batch.numbers]]
        for scale, values in scaled.items():
            angles = values[..., None] * getattr(self, scale)
            parts += [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=-1) * batch.mask[..., None]


class SelfAttention(nn.Module):
    """Scaled dot-product attention over H heads (report, sections 5.3 to 5.7)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(dense(width, width) for _ in range(3))
        self.output = dense(width, width)

    def forward(
        self, query_BTD: Tensor, tokens_BTD: Tensor, mask_BT: Tensor, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attended states (B, T, D), and on demand the weights (B, H, T, T), 0 at padded keys."""
        q, k, v = (
            part(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, states in zip(self.projections, (query_BTD, tokens_BTD, tokens_BTD), strict=True)
        )
        attended, weights_BHTT = attend(q, k, v, mask_BT[:, None, None, :], weights)
        return self.output(attended.transpose(1, 2).flatten(2)), weights_BHTT


class EncoderLayer(nn.Module):
    """norm(h + attention(h)), then norm(h + feedforward(h)) (report, section 5.9)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.feedforward = nn.Sequential(
            dense(width, feedforward), nn.ReLU(), nn.Dropout(dropout), dense(feedforward, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BTD: Tensor, mask_BT: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """States after the layer, and on demand its attention (B, H, T, T)."""
        attended, weights_BHTT = self.attention(h_BTD, h_BTD, mask_BT, weights)
        h_BTD = self.norms[0](h_BTD + self.dropout(attended))
        return self.norms[1](h_BTD + self.dropout(self.feedforward(h_BTD))), weights_BHTT


class Pooling(nn.Module):
    """(B, T, D) -> (B, 4 D): [CLS], a learned query's attention, maximum and mean (report, section 5.11).

    Maximum and mean are over the elements; the query attends to [CLS] as well.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attention = SelfAttention(width, heads)

    def forward(self, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The four pooled vectors, joined in this order."""
        query = self.query.expand(len(h_BTD), 1, -1)
        attended = self.attention(query, h_BTD, mask_BT)[0].squeeze(1)
        elements, present = h_BTD[:, 1:], mask_BT[:, 1:, None]
        highest = elements.masked_fill(~present, -torch.inf).amax(dim=1)
        mean = (elements * present).sum(dim=1) / present.sum(dim=1)
        return torch.cat([h_BTD[:, 0], attended, highest, mean], dim=-1)


class EDMTransformer(CompositionNetwork):
    """EDM, input projection, encoder, four poolings, shared trunk, one head a target."""

    def __init__(self, sizes: dict[str, Any], targets: list[str], task_weights: str = "sum"):
        super().__init__(targets, task_weights)
        width, heads, dropout = sizes["width"], sizes["heads"], sizes["dropout"]
        if width % heads:
            raise InputError(
                f"compositions.edm_transformer: {heads} heads do not divide width {width}; change one"
            )
        self.descriptor = Descriptor()
        self.project = dense(N_FEATURES, width)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, sizes["feedforward"], dropout) for _ in range(sizes["layers"])
        )
        self.pool = Pooling(width, heads)
        self.trunk = nn.Sequential(
            nn.LayerNorm(4 * width), dense(4 * width, width), nn.GELU(), nn.Dropout(dropout)
        )
        self.heads = TargetHeads(targets, width, width // 2, dropout)

    def encode(self, batch: CompositionBatch, weights: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Token states (B, T, D), mask (B, T), and on demand each layer's attention (B, H, T, T)."""
        h_BTD = self.project(self.descriptor(batch))
        h_BTD = torch.cat([self.cls.expand(len(h_BTD), 1, -1), h_BTD], dim=1)
        mask_BT = functional.pad(batch.mask, (1, 0), value=True)
        maps = []
        for layer in self.layers:
            h_BTD, weights_BHTT = layer(h_BTD, mask_BT, weights)
            if weights_BHTT is not None:
                maps.append(weights_BHTT)
        return h_BTD, mask_BT, maps

    def forward(self, batch: CompositionBatch) -> dict[str, Tensor]:
        """{target: (B,)}: standardised values, logits."""
        h_BTD, mask_BT, _ = self.encode(batch)
        return self.heads(self.trunk(self.pool(h_BTD, mask_BT)))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "encoder" (projection, [CLS], layers), at its own rate, and "new" (pooling, trunk, heads)."""
        groups: dict[str, list[nn.Parameter]] = {"new": [], "lora": [], "encoder": []}
        for name, parameter in self.named_parameters():
            groups["encoder" if name.startswith(("project.", "cls", "layers.")) else "new"].append(parameter)
        return groups
