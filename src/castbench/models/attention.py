"""Attention of queries to keys and values, in padded blocks or packed texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from castbench import kernels
from castbench.models.batch import GROUP, gather_block

KERNEL_WIDTH = 64  # of a head, up to which the registers of a GPU hold what attention's kernels sum up


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
