"""CAST: the nodes of a crystal attend to the tokens of its text (Lee et al. 2025, sections 2.3 and 4.3.1).

The paper fixes four cross-attention layers, eight heads, width 128, nodes as queries, tokens as keys and
values. Chosen here: a feed-forward block behind each attention; layer normalisation before each block
(pre-LN), which leaves coGN's states on an untouched residual path; none for the tokens, which leave the text
encoder normalised.

Axis suffixes: B crystals, N nodes (padded), T tokens (padded), H heads, D width of a row, d width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.errors import InputError
from castbench.models.base import Network, Outcome
from castbench.models.batch import GROUP, Batch, gather_block, pad, rows_of, unpad
from castbench.models.cogn import CoGN
from castbench.models.elements import N_ELEMENTS
from castbench.models.heads import Regression, attend, dense
from castbench.models.text import TextEncoder


class CrossAttentionLayer(nn.Module):
    """h + attention(norm(h), tokens), then h + feedforward(norm(h)), on node states h (B, N, n_node)."""

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

    def forward(
        self, h_BND: Tensor, k_BTD: Tensor, v_BTD: Tensor, mask_BT: Tensor, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Node states after the layer; on demand also the weights (B, H, N, T), 0 at padded tokens."""
        q_BHNd, k_BHTd, v_BHTd = map(self._split, (self.query(self.norm(h_BND)), k_BTD, v_BTD))
        mask_B11T = mask_BT[:, None, None, :]
        attended_BHNd, weights_BHNT = attend(q_BHNd, k_BHTd, v_BHTd, mask_B11T, weights)
        h_BND = h_BND + self.dropout(self.output(attended_BHNd.transpose(1, 2).flatten(2)))
        return h_BND + self.dropout(self.feedforward(h_BND)), weights_BHNT

    def attend_states(self, h_BND: Tensor, tokens_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        """The same node states from token states (B, T, n_text), of which no keys and values are made.

        A score q (K x + b) is (q K) x + q b, and the weights w of a query give V (sum of w x) + b.
        """
        q_BHNd = self._split(self.query(self.norm(h_BND))) * (self.query.out_features // self.heads) ** -0.5
        key_HdE, value_HdE = (part.weight.unflatten(0, (self.heads, -1)) for part in (self.key, self.value))
        key_Hd1 = self.key.bias.unflatten(0, (self.heads, -1, 1))
        asked_BHNE, shift_BHN1 = q_BHNd @ key_HdE, q_BHNd @ key_Hd1
        scores_BST = asked_BHNE.flatten(1, 2) @ tokens_BTE.mT + shift_BHN1.flatten(1, 2)
        shares_BST = scores_BST.masked_fill(~mask_BT[:, None], -torch.inf).softmax(dim=-1)
        found_BHNE = (shares_BST.to(tokens_BTE.dtype) @ tokens_BTE).unflatten(1, asked_BHNE.shape[1:3])
        attended_BND = (found_BHNE @ value_HdE.mT).transpose(1, 2).flatten(2) + self.value.bias
        h_BND = h_BND + self.dropout(self.output(attended_BND))
        return h_BND + self.dropout(self.feedforward(h_BND))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Fusion(nn.ModuleList):
    """CAST's cross-attention layers; 1,448,448 parameters at the paper's sizes and text width 768."""

    def __init__(self, n_node: int, n_text: int, layers: int, **sizes: Any):
        super().__init__(CrossAttentionLayer(n_node, n_text, **sizes) for _ in range(layers))
        self.n_text: int = n_text
        self.heads: int = sizes["heads"]
        self.width: int = sizes["width"]

    def forward(self, nodes: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Packed node states (nodes, n_node) that have read the packed tokens (tokens, n_text)."""
        fused, places = [], []
        for crystals in self._groups(batch):
            rows, node_offsets = rows_of(batch.node_offsets, crystals)
            h_BND, _ = pad(nodes.index_select(0, rows), node_offsets)
            tokens_BTE, mask_BT = gather_block(tokens, batch.token_offsets, crystals)
            tokens_BTE = tokens_BTE.to(product_type(nodes))
            if self._keys_cost_more(h_BND.shape[1], tokens_BTE.shape[1]):
                layers: list[Any] = list(self)
                for layer in layers:
                    h_BND = layer.attend_states(h_BND, tokens_BTE, mask_BT)
            else:
                h_BND, _ = self.attend(h_BND, tokens_BTE, mask_BT)
            fused.append(unpad(h_BND, node_offsets))
            places.append(rows)
        return torch.cat(fused).index_select(0, torch.cat(places).argsort())

    def _groups(self, batch: Batch) -> tuple[Tensor, ...]:
        """Crystals of about equally many tokens together, those of few nodes apart from those of many."""
        tokens, nodes = batch.token_offsets.diff(), batch.node_offsets.diff()
        many = nodes * self.heads >= self.width
        return (tokens + many * (tokens.max() + 1)).argsort(stable=True).split(GROUP)

    def _keys_cost_more(self, nodes: int, tokens: int) -> bool:
        """Whether making keys and values takes more products than having all queries meet the states."""
        made = tokens * self.width * self.n_text + nodes * tokens * self.width
        met = nodes * self.heads * tokens * self.n_text + nodes * self.width * self.n_text
        return met < made

    def attend(
        self, h_BND: Tensor, tokens_BTD: Tensor, mask_BT: Tensor, weights: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Node states after all layers, and, where `weights` is set, each layer's attention (B, H, N, T)."""
        # Keys and values of all layers in one product: they depend on the text alone.
        layers: list[Any] = list(self)
        projections = [part for layer in layers for part in (layer.key, layer.value)]
        weight = torch.cat([part.weight for part in projections])
        bias = torch.cat([part.bias for part in projections])
        tokens_BTD = tokens_BTD.to(product_type(h_BND))
        kv_BTD = functional.linear(tokens_BTD, weight, bias).chunk(len(projections), dim=-1)
        maps = []
        for layer, k_BTD, v_BTD in zip(layers, kv_BTD[::2], kv_BTD[1::2], strict=True):
            h_BND, weights_BHNT = layer(h_BND, k_BTD, v_BTD, mask_BT, weights)
            if weights_BHNT is not None:
                maps.append(weights_BHNT)
        return h_BND, maps


def product_type(states: Tensor) -> torch.dtype:
    """Type in which products with `states` are taken: that of autocast, where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class CrossAttentionNetwork(Network):
    """coGN, the text encoder and their fusion: what pretraining and property prediction share.

    Raises:
        InputError: the heads do not divide the width.
    """

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        sizes = dict(architecture["cross_attention"])
        if sizes["width"] % sizes["heads"]:
            width, heads = sizes["width"], sizes["heads"]
            raise InputError(
                f"architecture.cross_attention: {heads} heads do not divide width {width}; change one"
            )
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

        Rows of real nodes sum to 1 over the crystal's tokens and are 0 at padding; padded rows mean nothing.
        """
        h_BND, _ = pad(self.cogn.nodes(batch), batch.node_offsets)
        h_BND, maps = self.fusion.attend(h_BND, *pad(self.text(batch), batch.token_offsets), weights=True)
        return self.head(self.cogn.readout(unpad(h_BND, batch.node_offsets), batch)), maps


class MaskedNodePretraining(CrossAttentionNetwork):
    """Masked node prediction: from neighbours and text, name the element of nodes whose input is hidden."""

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
