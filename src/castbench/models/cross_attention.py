"""CAST: the nodes of a crystal attend to the tokens of its text (Lee et al. 2025, sections 2.3 and 4.3.1).

The paper fixes four cross-attention layers, eight heads, width 128, nodes as queries, tokens as keys and
values. Chosen here: a feed-forward block behind each attention; layer normalisation before each block
(pre-LN), which leaves the structure encoder's states on an untouched residual path; none for the tokens,
which leave the text encoder normalised.

Axis suffixes: B crystals, N nodes (padded), T tokens (padded), H heads, D width of a row, d width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench import kernels
from castbench.errors import InputError
from castbench.models.attention import attend, has_kernels
from castbench.models.base import Network, Outcome
from castbench.models.batch import Batch, Block, Sizes, gather_block, pad, rows_of, unpad
from castbench.models.elements import N_ELEMENTS
from castbench.models.heads import Exact, Regression, dense, product_type
from castbench.models.streams import beside
from castbench.models.structure import build_structure_encoder
from castbench.models.text import TextEncoder

# What starting the operations of one more group costs, in products of a layer. Measured on a CPU; on a GPU a
# guess, after which a batch is a group or two.
OVERHEAD = {"cpu": 12_000_000, "cuda": 2_000_000_000}
LARGEST = 64  # crystals of a group


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
        return self._updated(h_BND, attended_BHNd.transpose(1, 2).flatten(2)), weights_BHNT

    def attend_packed(self, h_ND: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """The same of packed node states, where `read` tells what packed queries (N, width) attend to."""
        return self._updated(h_ND, read(self.query(self.norm(h_ND))))

    def attend_states(self, h_BND: Tensor, tokens_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        """The same node states from token states (B, T, n_text), of which no keys and values are made.

        A score q (K x + b) is (q K) x + q b, and the weights w of a query give V (sum of w x) + b.
        """
        heads, rows = self.heads, h_BND.shape[0] * h_BND.shape[1]
        key_HdE, value_HdE = (part.weight.unflatten(0, (heads, -1)) for part in (self.key, self.value))
        # A product a head over the nodes of all crystals, not one a crystal: the weights are the same.
        q_HMd = self.query(self.norm(h_BND)).view(rows, heads, -1).transpose(0, 1)
        q_HMd = q_HMd * q_HMd.shape[-1] ** -0.5
        shift_HM = (q_HMd @ self.key.bias.view(heads, -1, 1)).squeeze(-1)
        asked_HME = q_HMd @ key_HdE
        by_crystal = (heads, len(h_BND), -1)  # S queries of a crystal: heads times nodes
        asked_BSE = asked_HME.view(*by_crystal, tokens_BTE.shape[2]).transpose(0, 1).flatten(1, 2)
        shift_BS1 = shift_HM.view(by_crystal).transpose(0, 1).flatten(1).unsqueeze(-1)
        hidden_B1T = torch.zeros_like(mask_BT, dtype=tokens_BTE.dtype).masked_fill(~mask_BT, -torch.inf)
        scores_BST = torch.baddbmm(hidden_B1T.unsqueeze(1), asked_BSE, tokens_BTE.mT) + shift_BS1
        shares_BST = scores_BST.softmax(dim=-1).to(tokens_BTE.dtype)
        found_BHNE = (shares_BST @ tokens_BTE).unflatten(1, (heads, -1))
        attended_HMd = found_BHNE.transpose(0, 1).flatten(1, 2) @ value_HdE.mT
        attended_BND = attended_HMd.transpose(0, 1).reshape(*h_BND.shape[:2], -1) + self.value.bias
        return self._updated(h_BND, attended_BND)

    def _updated(self, h: Tensor, attended: Tensor) -> Tensor:
        h = h + self.dropout(self.output(attended))
        return h + self.dropout(self.feedforward(h))

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
        if batch.sizes is not None:
            return self.fuse_padded(nodes, self.keys_and_values(tokens), batch, batch.sizes)
        fused, places = [], []
        for crystals in self._groups(batch):
            rows, node_offsets = rows_of(batch.node_offsets, crystals)
            h_BND, _ = pad(nodes.index_select(0, rows), node_offsets)
            tokens_BTE, mask_BT = gather_block(tokens, batch.token_offsets, crystals)
            tokens_BTE = tokens_BTE.to(product_type(nodes))
            made, met = self._products(h_BND.shape[1], tokens_BTE.shape[1])
            if met < made:
                layers: list[Any] = list(self)
                for layer in layers:
                    h_BND = layer.attend_states(h_BND, tokens_BTE, mask_BT)
            else:
                h_BND, _ = self.attend(h_BND, tokens_BTE, mask_BT)
            fused.append(unpad(h_BND, node_offsets))
            places.append(rows)
        return torch.cat(fused).index_select(0, torch.cat(places).argsort())

    def fuse_padded(self, h_ND: Tensor, kv_TC: Tensor, batch: Batch, sizes: Sizes) -> Tensor:
        """The same of a padded batch, without the host having to know more than its sizes.

        Args:
            h_ND: node states.
            kv_TC: keys and values of the tokens.
            batch: padded.
            sizes: of the batch.
        """
        layers: list[Any] = list(self)
        kind = product_type(h_ND)
        read = self._reader(kv_TC, batch, sizes)
        if kernels.usable("fusion", h_ND.device, kind):
            from castbench.kernels import fusion

            if all(map(fusion.fits, layers)):
                return fusion.fuse(h_ND, layers, read, kind)
        for layer in layers:
            h_ND = layer.attend_packed(h_ND, read)
        return h_ND

    def _reader(self, kv_TC: Tensor, batch: Batch, sizes: Sizes) -> Callable[[Tensor], Tensor]:
        """A function that, called once a layer, tells what its packed queries (N, width) attend to."""
        if has_kernels("cross_attention", kv_TC, self.width // self.heads):
            from castbench.kernels.cross_attention import Reader, Segments

            most = sizes.most_nodes, sizes.most_tokens
            return Reader(kv_TC, Segments(batch.node_offsets, batch.token_offsets, *most), self.heads)
        nodes = Block(batch.node_offsets, sizes.nodes, sizes.most_nodes)
        tokens = Block(batch.token_offsets, sizes.tokens, sizes.most_tokens)
        each_BTD = iter(self._each(tokens.padded(kv_TC)))
        mask_B11T = tokens.mask[:, None, None, :]

        def read(q_ND: Tensor) -> Tensor:
            q_BHNd, k_BHTd, v_BHTd = (
                x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for x_BLD in (nodes.padded(q_ND), next(each_BTD), next(each_BTD))
            )
            # Explicitly: for so few queries torch's kernels are slower, and their gradients vary.
            attended_BHNd, _ = attend(q_BHNd, k_BHTd, v_BHTd, mask_B11T, weights=True)
            return nodes.packed(attended_BHNd.transpose(1, 2).flatten(2))

        return read

    def _groups(self, batch: Batch) -> list[Tensor]:
        """Crystals that are padded to one size together: those of like size, so that it costs the least."""
        nodes, tokens = (offsets.diff().tolist() for offsets in (batch.node_offsets, batch.token_offsets))
        order = sorted(range(batch.n), key=lambda crystal: (nodes[crystal], tokens[crystal]))
        overhead = OVERHEAD[batch.node_offsets.device.type]
        costs, starts = [0] * (batch.n + 1), [0] * (batch.n + 1)
        for end in range(1, batch.n + 1):  # the cheapest way to cut the first `end`, by that of fewer
            most_nodes = most_tokens = 0
            costs[end] = sys.maxsize
            for start in range(end - 1, max(end - LARGEST, 0) - 1, -1):
                most_nodes = max(most_nodes, nodes[order[start]])
                most_tokens = max(most_tokens, tokens[order[start]])
                products = min(self._products(most_nodes, most_tokens))
                if (cost := costs[start] + (end - start) * products + overhead) < costs[end]:
                    costs[end], starts[end] = cost, start
        groups, end = [], batch.n
        while end:
            groups.append(torch.tensor(order[starts[end] : end], device=batch.node_offsets.device))
            end = starts[end]
        return groups

    def _products(self, nodes: int, tokens: int) -> tuple[int, int]:
        """Products of a layer that makes a crystal's keys and values, and of one without them."""
        made = tokens * self.width * self.n_text + nodes * tokens * self.width
        met = nodes * self.heads * tokens * self.n_text + nodes * self.width * self.n_text
        return made, met

    def attend(
        self, h_BND: Tensor, tokens_BTD: Tensor, mask_BT: Tensor, weights: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Node states after all layers, and, where `weights` is set, each layer's attention (B, H, N, T)."""
        layers: list[Any] = list(self)
        kv_BTD = self._each(self.keys_and_values(tokens_BTD))
        maps = []
        for layer, k_BTD, v_BTD in zip(layers, kv_BTD[::2], kv_BTD[1::2], strict=True):
            h_BND, weights_BHNT = layer(h_BND, k_BTD, v_BTD, mask_BT, weights)
            if weights_BHNT is not None:
                maps.append(weights_BHNT)
        return h_BND, maps

    def keys_and_values(self, tokens: Tensor) -> Tensor:
        """Keys and values (..., 2 layers width) of all layers, in one product: they depend on text alone.

        Args:
            tokens: (..., n_text).
        """
        layers: list[Any] = list(self)
        kind = product_type(layers[0].key.weight)
        projections = [part for layer in layers for part in (layer.key, layer.value)]
        if kernels.usable("projection", tokens.device, kind):
            from castbench.kernels import projection

            if projection.fits(tokens, kind):
                return projection.project(tokens, projections, kind)
        weight = torch.cat([part.weight for part in projections])
        bias = torch.cat([part.bias for part in projections])
        return functional.linear(tokens.to(kind), weight, bias)

    def _each(self, keys_and_values: Tensor) -> tuple[Tensor, ...]:
        """Keys (..., width) of the first layer, its values, keys of the second, and so on."""
        return keys_and_values.chunk(2 * len(self), dim=-1)


class CrossAttentionNetwork(Network):
    """Both encoders and their fusion: what pretraining and property prediction share.

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
        super().__init__(build_structure_encoder(architecture, pooled=False), TextEncoder(encoder, lora))
        self.fusion = Fusion(self.structure.width, self.text.width, **sizes)

    def fused(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Packed node states (nodes, n_node) that have read the text; `hidden` as of `StructureEncoder`."""
        if batch.sizes is None:
            return self.fusion(self.structure.nodes(batch, hidden), self.text(batch), batch)
        tokens = self.text(batch)
        with beside(tokens) as join:  # the structure encoder's many small passes leave room on a GPU
            keys_and_values = self.fusion.keys_and_values(tokens)
        nodes = self.structure.nodes(batch, hidden)
        join()
        return self.fusion.fuse_padded(nodes, keys_and_values, batch, batch.sizes)


class Cast(CrossAttentionNetwork):
    """Property prediction from the mean of the fused nodes by one linear layer."""

    pretrained = ("structure", "text", "fusion")

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        super().__init__(architecture, encoder)
        self.head = Regression(self.structure.width)

    def forward(self, batch: Batch) -> Tensor:
        """Standardised predictions (B,)."""
        return self.head(self.structure.readout(self.fused(batch), batch))

    def attention_maps(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Predictions (B,) and each layer's attention weights (B, H, N, T).

        Rows of real nodes sum to 1 over the crystal's tokens and are 0 at padding; padded rows mean nothing.
        """
        h_BND, _ = pad(self.structure.nodes(batch), batch.node_offsets)
        h_BND, maps = self.fusion.attend(h_BND, *pad(self.text(batch), batch.token_offsets), weights=True)
        return self.head(self.structure.readout(unpad(h_BND, batch.node_offsets), batch)), maps


class MaskedNodePretraining(CrossAttentionNetwork):
    """Masked node prediction: from neighbours and text, name the element of nodes whose input is hidden."""

    def __init__(self, architecture: dict[str, Any], encoder: Path):
        super().__init__(architecture, encoder)
        self.hidden = nn.Parameter(torch.empty(self.structure.width).uniform_(-0.05, 0.05))
        self.head = dense(self.structure.width, N_ELEMENTS, Exact)

    def logits(self, batch: Batch) -> Tensor:
        """Scores (nodes, 118) of each node's element; column Z - 1."""
        return self.head(self.fused(batch, self.hidden))

    def forward(self, batch: Batch) -> Outcome:
        """Cross-entropy over the masked nodes of the batch; `correct` counts those named right."""
        logits, elements = self.logits(batch), batch.atomic_numbers - 1
        count = batch.masked_nodes.sum()
        each = functional.cross_entropy(logits, elements, reduction="none")
        right = (logits.argmax(dim=1) == elements) & batch.masked_nodes
        return Outcome((each * batch.masked_nodes).sum() / count, right.sum(), count)
