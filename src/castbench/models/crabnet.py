"""A baseline in the manner of CrabNet: self-attention over mat2vec vectors.

Written from the published description (Wang et al., npj Comput. Mater. 7, 77, 2021). Kept: mat2vec projected
to the model's width, fractions as sinusoids on a linear and a logarithmic scale that are added with learned
scales, an encoder without [CLS], one residual head an element whose outputs are averaged with a learned gate.
Changed, so that it differs from the EDM Transformer by the model alone: standardised vectors, several
targets, the same losses, optimiser and splits. Smaller: by default half as wide, and the head has one layer
less (published: 512, feed-forward 2048, head 1024, 512, 256, 128). Fractions are not jittered in training.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from castbench.compositions.descriptors import N_MAT2VEC, element_table
from castbench.errors import InputError
from castbench.models.composition import CompositionBatch, CompositionNetwork
from castbench.models.heads import Exact, dense

RESOLUTION, BASE = 5000, 50.0  # of the sinusoids
LOG_SCALE = 0.0025  # x -> min(1, 0.0025 log2(x)^2)


class FractionEncoding(nn.Module):
    """Sinusoids (B, L, width) of atomic fractions: half on a linear, half on a logarithmic scale.

    Each half has a learned scale that begins at 1; CrabNet's 2^((1 - s)^2) has no gradient where it begins.
    """

    def __init__(self, width: int):
        super().__init__()
        steps = torch.arange(width // 4) / (width // 4)
        self.frequencies: Tensor
        self.register_buffer("frequencies", RESOLUTION * BASE**-steps, persistent=False)
        self.scales = nn.Parameter(torch.ones(2))

    def forward(self, fractions: Tensor) -> Tensor:
        """Encoded fractions; padding (0) is masked by the caller."""
        logarithmic = (LOG_SCALE * fractions.clamp(min=1 / RESOLUTION).log2().square()).clamp(max=1.0)
        parts = []
        for scale, values in zip(self.scales, (fractions, logarithmic), strict=True):
            angles = values[..., None] * self.frequencies
            parts.append(scale * torch.cat([angles.sin(), angles.cos()], dim=-1))
        return torch.cat(parts, dim=-1)


class ResidualHead(nn.Module):
    """Residual layers of falling width, (B, L, width) -> (B, L, outputs)."""

    def __init__(self, width: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        widths = [width, *hidden]
        pairs = list(pairwise(widths))
        self.layers = nn.ModuleList(dense(a, b) for a, b in pairs)
        self.skips = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.output = dense(widths[-1], outputs, Exact)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of every element."""
        for layer, skip in zip(self.layers, self.skips, strict=True):
            x = nn.functional.leaky_relu(layer(x)) + skip(x)
        return self.output(x)


class CrabNetStyle(CompositionNetwork):
    """Attention on mat2vec and fractions; an answer of every element, averaged with a gate."""

    def __init__(self, sizes: dict[str, Any], targets: list[str], task_weights: str = "sum"):
        super().__init__(targets, task_weights)
        width, heads = sizes["width"], sizes["heads"]
        if width % heads or width % 4:
            raise InputError(
                f"compositions.crabnet: width {width} is not a multiple of 4 and of {heads} heads; change one"
            )
        self.table: Tensor
        self.register_buffer("table", torch.from_numpy(element_table()[:, :N_MAT2VEC]), persistent=False)
        self.project = dense(N_MAT2VEC, width)
        self.element_scale = nn.Parameter(torch.ones(1))
        self.encode_fractions = FractionEncoding(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, sizes["feedforward"], sizes["dropout"], batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes["layers"], enable_nested_tensor=False)
        hidden = (width, width // 2, width // 4)
        self.head = ResidualHead(width, hidden, 2 * len(targets))

    def forward(self, batch: CompositionBatch) -> dict[str, Tensor]:
        """{target: (B,)}: standardised values, logits."""
        mask = batch.mask[..., None]
        scale = 2.0**self.element_scale
        x = scale * self.project(self.table[batch.numbers]) + self.encode_fractions(batch.fractions)
        x = self.encoder(x * mask, src_key_padding_mask=~batch.mask)
        values, gates = self.head(x).chunk(2, dim=-1)
        mean = (values * gates.sigmoid() * mask).sum(dim=1) / mask.sum(dim=1)
        return {target: mean[:, column] for column, target in enumerate(self.targets)}
