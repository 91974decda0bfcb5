"""The small layers that models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench import kernels
from castbench.models.batch import GROUP, gather_block

KERNEL_WIDTH = 64  # of a head, up to which the registers of a GPU hold what attention's kernels sum up


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


def has_kernels(name: str, states: Tensor, width: int) -> bool:
    """Whether such states, in heads of a width, attend by the kernels of file `name`."""
    return width <= KERNEL_WIDTH and kernels.usable(name, states.device, states.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weights: bool) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of queries (B, H, Q, d) to keys and values (B, H, T, d).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: (B, 1, 1, T), true at real keys.
        weights: also return them (B, H, Q, T), exactly 0 at padding; by an explicit softmax.
    """
    if not weights:
        return functional.scaled_dot_product_attention(q, k, v, mask), None
    scores = q @ k.mT / q.shape[-1] ** 0.5
    shares = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return shares @ v, shares


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    q_offsets: Tensor,
    k_offsets: Tensor,
    longest: int,
    padded: bool,
) -> Tensor:
    """Attention of each text's queries (Q, D) to its own keys and values (T, D); returns (Q, D).

    Packed, with offsets (B + 1,) of texts of at most `longest` tokens, which all are queries, or one of them.
    Of a padded batch, whose last text is none, by the kernels. In half precision on a GPU by variable-length
    flash attention; else texts are padded with their neighbours, which costs little where they come sorted by
    length.
    """
    if padded:
        from castbench.kernels.cross_attention import Reader, Segments
        from castbench.kernels.self_attention import attend_own

        if q_offsets is k_offsets:
            return attend_own(torch.cat([q, k, v], dim=1), k_offsets, longest, heads)
        segments = Segments(q_offsets, k_offsets, 1, longest)
        return Reader(torch.cat([k, v], dim=1), segments, heads)(q)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    if has_variable_length(q):
        from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler: seconds

        context: Any = varlen_attn(q, k, v, q_offsets.int(), k_offsets.int(), longest, longest)
        return context.flatten(1)
    attended = []
    for texts in torch.arange(len(k_offsets) - 1, device=q.device).split(GROUP):
        q_BQHd, real_BQ = gather_block(q, q_offsets, texts)
        (k_BTHd, mask_BT), (v_BTHd, _) = (gather_block(part, k_offsets, texts) for part in (k, v))
        q_BHQd, k_BHTd, v_BHTd = (part.transpose(1, 2) for part in (q_BQHd, k_BTHd, v_BTHd))
        found_BHQd, _ = attend(q_BHQd, k_BHTd, v_BHTd, mask_BT[:, None, None, :], weights=False)
        attended.append(found_BHQd.transpose(1, 2)[real_BQ].flatten(1))
    return torch.cat(attended)


def has_variable_length(q: Tensor) -> bool:
    """Whether flash attention for texts of various lengths takes such queries."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


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
