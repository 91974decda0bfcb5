"""CAST: the nodes of a crystal attend to the tokens of its text (Lee et al. 2025, sections 2.3 and 4.3.1).

The paper fixes four cross-attention layers, eight heads, width 128, nodes as queries, tokens as keys and values. Chosen
here: a feed-forward block behind each attention; layer normalisation before each block (pre-LN), which leaves coGN's
states on an untouched residual path; no normalisation of keys and values, which leave the text encoder normalised.

Node states travel packed; only queries, keys and values are padded, after their projections. Axis suffixes: B crystals,
N nodes (padded), T tokens (padded), H heads, d width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.base import Network, Outcome
from castbench.models.batch import Batch, pad, unpad
from castbench.models.cogn import CoGN
from castbench.models.elements import N_ELEMENTS
from castbench.models.heads import Regression, dense
from castbench.models.text import TextEncoder


class CrossAttentionLayer(nn.Module):
    """h + attention(norm(h), tokens), then h + feedforward(norm(h)), on packed nodes (nodes, n_node)."""

    def __init__(self, n_node: int, n_text: int, heads: int, width: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(n_node)
        self.query = dense(n_node, width)
        self.key = dense(n_text, width)
        self.value = dense(n_text, width)
        self.output = dense(width, n_node)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(n_node), dense(n_node, feedforward), nn.GELU(), dense(feedforward, n_node)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Node states (nodes, n_node) after attention to the token states (tokens, n_text) of their own text."""
        q_BHNd, k_BHTd, v_BHTd, mask_BT = self._project(nodes, tokens, batch)
        attended_BHNd = functional.scaled_dot_product_attention(
            q_BHNd, k_BHTd, v_BHTd, attn_mask=mask_BT[:, None, None, :]
        )
        return self._add(nodes, attended_BHNd, batch)

    def with_weights(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same by way of the attention weights (B, H, N, T), which come second: 0 at padded tokens."""
        q_BHNd, k_BHTd, v_BHTd, mask_BT = self._project(nodes, tokens, batch)
        scores_BHNT = q_BHNd @ k_BHTd.mT / q_BHNd.shape[-1] ** 0.5
        weights_BHNT = scores_BHNT.masked_fill(~mask_BT[:, None, None, :], -torch.inf).softmax(dim=-1)
        return self._add(nodes, weights_BHNT @ v_BHTd, batch), weights_BHNT

    def _project(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, H, N, d), keys and values (B, H, T, d), and the mask (B, T) of real tokens."""
        q, _ = pad(self.query(self.norm(nodes)), batch.node_offsets)
        k, mask_BT = pad(self.key(tokens), batch.token_offsets)
        v, _ = pad(self.value(tokens), batch.token_offsets)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v, mask_BT

    def _add(self, nodes: Tensor, attended_BHNd: Tensor, batch: Batch) -> Tensor:
        """Both residual steps, given what the nodes attended to."""
        attended = unpad(attended_BHNd.transpose(1, 2).flatten(2), batch.node_offsets)
        nodes = nodes + self.dropout(self.output(attended))
        return nodes + self.dropout(self.feedforward(nodes))


class Fusion(nn.ModuleList):
    """CAST's cross-attention layers; 1,448,448 parameters at the paper's sizes and text width 768."""

    def __init__(self, n_node: int, n_text: int, layers: int, **sizes: Any):
        super().__init__(CrossAttentionLayer(n_node, n_text, **sizes) for _ in range(layers))

    def forward(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Node states (nodes, n_node) that have read the tokens (tokens, n_text)."""
        for layer in self:
            nodes = layer(nodes, tokens, batch)
        return nodes

    def with_weights(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The same, and each layer's attention weights (B, H, N, T)."""
        weights = []
        for layer in self:
            nodes, weights_BHNT = layer.with_weights(nodes, tokens, batch)
            weights.append(weights_BHNT)
        return nodes, weights


class CrossAttentionNetwork(Network):
    """coGN, the text encoder and their fusion: what pretraining and property prediction share."""

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        sizes = dict(architecture["cross_attention"])
        lora = architecture["lora"] if sizes.pop("text") == "lora" else None
        super().__init__(CoGN(**architecture["cogn"]), TextEncoder(encoder, lora))
        self.fusion = Fusion(self.cogn.width, self.text.width, **sizes)


class Cast(CrossAttentionNetwork):
    """Property prediction from the mean of the fused nodes by one linear layer."""

    pretrained = ("cogn", "text", "fusion")

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        super().__init__(architecture, encoder)
        self.head = Regression(self.cogn.width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        fused = self.fusion(self.cogn.nodes(batch), self.text(batch), batch)
        return self.head(self.cogn.readout(fused, batch))

    def attention_maps(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Predictions (B,) and each layer's attention weights (B, H, N, T).

        Rows of padded nodes mean nothing; the real ones sum to 1 over the crystal's tokens and are 0 at padding.
        """
        fused, weights = self.fusion.with_weights(self.cogn.nodes(batch), self.text(batch), batch)
        return self.head(self.cogn.readout(fused, batch)), weights


class MaskedNodePretraining(CrossAttentionNetwork):
    """Masked node prediction: name the element of nodes whose whole input is hidden, from neighbours and text."""

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        super().__init__(architecture, encoder)
        self.hidden = nn.Parameter(torch.empty(self.cogn.width).uniform_(-0.05, 0.05))
        self.head = dense(self.cogn.width, N_ELEMENTS)

    def logits(self, batch: Batch) -> Tensor:
        """Scores (nodes, 118) of each node's element; column Z - 1."""
        return self.head(self.fusion(self.cogn.nodes(batch, self.hidden), self.text(batch), batch))

    def forward(self, batch: Batch) -> Outcome:
        """Cross-entropy over the masked nodes of the batch; `correct` counts those named right."""
        logits = self.logits(batch)[batch.masked_nodes]
        elements = batch.atomic_numbers[batch.masked_nodes] - 1
        loss = functional.cross_entropy(logits, elements)
        return Outcome(loss, (logits.argmax(dim=1) == elements).sum(), len(elements))
