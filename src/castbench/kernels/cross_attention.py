"""Exact cross-attention of packed queries to the packed keys and values of their segment (see `segments.py`).

Queries are few: a crystal's nodes, or a text's [CLS]. So a program's warps share the segment's keys.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from castbench.kernels.segments import (
    clear_rows,
    columns_of,
    drawn,
    load_rows,
    own_rows,
    scales,
    see_exact,
    store_rows,
)


class Tiles(NamedTuple):
    """Keys that a warp has in hand, a program's warps and the depth of its loads."""

    keys: int
    warps: int
    stages: int


QUERIES = 16  # of a program
TILES, SINGLE = Tiles(32, 2, 2), Tiles(16, 4, 2)  # SINGLE: in float32
BLOCK = 64  # keys of a program that sums up their gradients
PRECISION = "bf16x3"  # in float32 products are three of bfloat16 parts, exact to 2^-16


@triton.jit
def _shared_keys(
    k, v, start, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Keys and values (WARPS, KEYS, COLUMNS), a block a warp, and which there are (WARPS, 1, KEYS)."""
    warp, place = tl.arange(0, WARPS)[:, None, None], tl.arange(0, KEYS)
    column = tl.arange(0, COLUMNS)[None, None, :]
    row = start + warp * KEYS + place[None, :, None]
    real = row < n
    if WIDTH != COLUMNS:
        real = real & (column < WIDTH)
    places = row * stride + column
    key, value = tl.load(k + places, mask=real, other=0.0), tl.load(v + places, mask=real, other=0.0)
    return key, value, start + warp * KEYS + place[None, None, :] < n


@triton.jit(do_not_specialize=["rows"])
def _forward(
    q, k, v, out, level, q_offsets, k_offsets, q_stride, k_stride, rows, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and the log2 of each query's sum of exponentials (heads, rows).

    Warps put together what each has found among its keys.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = own_rows(q_offsets)
    k_start, n_k = own_rows(k_offsets)
    out += q_start * out_stride + head * WIDTH
    if tl.program_id(2) == 0:  # rows that pad
        clear_rows(out, n_q, out_stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n_q:
        k += k_start * k_stride + head * WIDTH
        v += k_start * k_stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = load_rows(q + q_start * q_stride + head * WIDTH, row, n_q, q_stride, WIDTH, COLUMNS, False)
        query = tl.broadcast_to(query[None, :, :], (WARPS, QUERIES, COLUMNS))
        peak = tl.full([WARPS, QUERIES], -3e38, tl.float32)  # finite, for a warp that has no keys
        total = tl.full([WARPS, QUERIES], 0.0, tl.float32)
        found = tl.full([WARPS, QUERIES, COLUMNS], 0.0, tl.float32)
        for start in range(0, n_k, WARPS * KEYS):
            key, value, real = _shared_keys(k, v, start, n_k, k_stride, WIDTH, COLUMNS, KEYS, WARPS)
            score = tl.dot(query, tl.permute(key, (0, 2, 1)), input_precision=PRECISION) * scale
            score = tl.where(real, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 2))
            share = tl.exp2(score - higher[:, :, None])
            fade = tl.exp2(peak - higher)
            total = total * fade + tl.sum(share, 2)
            found *= fade[:, :, None]
            found = tl.dot(share.to(value.dtype), value, found, input_precision=PRECISION)
            peak = higher
        highest = tl.max(peak, 0)
        fade = tl.exp2(peak - highest[None, :])
        total = tl.sum(total * fade, 0)
        total = tl.where(n_k > 0, total, 1.0)  # who has nothing to attend to finds 0
        found = tl.sum(found * fade[:, :, None], 0) / total[:, None]
        store_rows(out, found, row, n_q, out_stride, WIDTH, COLUMNS)
        level += head.to(tl.int64) * rows + q_start
        tl.store(level + row, highest + tl.log2(total), mask=row < n_q)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward(
    q, k, v, out, gradient, level, of_q, of_k, of_v, q_offsets, k_offsets, q_stride, k_stride, rows, blocks,
    scale, factor, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, by the first `blocks` programs of a segment, and of keys and values.

    Those of QUERIES queries are summed as in `_forward`, those of BLOCK keys over blocks of queries.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = own_rows(q_offsets)
    k_start, n_k = own_rows(k_offsets)
    of_q += q_start * q_stride + head * WIDTH
    shift = k_start * k_stride + head * WIDTH
    of_k += shift
    of_v += shift
    k += shift
    v += shift
    q += q_start * q_stride + head * WIDTH
    out += q_start * out_stride + head * WIDTH
    gradient += q_start * out_stride + head * WIDTH
    level += head.to(tl.int64) * rows + q_start
    if tl.program_id(2) == 0:  # rows that pad
        clear_rows(of_q, n_q, q_stride, WIDTH, COLUMNS, QUERIES)
        clear_rows(of_k, n_k, k_stride, WIDTH, COLUMNS, BLOCK)
        clear_rows(of_v, n_k, k_stride, WIDTH, COLUMNS, BLOCK)
    elif block < blocks:
        if block * QUERIES < n_q:
            row = block * QUERIES + tl.arange(0, QUERIES)
            query = load_rows(q, row, n_q, q_stride, WIDTH, COLUMNS, False)
            output = load_rows(out, row, n_q, out_stride, WIDTH, COLUMNS, False)
            of_out = load_rows(gradient, row, n_q, out_stride, WIDTH, COLUMNS, False)
            mean = tl.sum(output.to(tl.float32) * of_out.to(tl.float32), 1)[None, :, None]
            height = tl.load(level + row, mask=row < n_q, other=0.0)[None, :, None]
            query = tl.broadcast_to(query[None, :, :], (WARPS, QUERIES, COLUMNS))
            of_out = tl.broadcast_to(of_out[None, :, :], (WARPS, QUERIES, COLUMNS))
            summed = tl.full([WARPS, QUERIES, COLUMNS], 0.0, tl.float32)
            for start in range(0, n_k, WARPS * KEYS):
                key, value, real = _shared_keys(k, v, start, n_k, k_stride, WIDTH, COLUMNS, KEYS, WARPS)
                score = tl.dot(query, tl.permute(key, (0, 2, 1)), input_precision=PRECISION) * scale
                share = tl.where(real, tl.exp2(score - height), 0.0)
                of_share = tl.dot(of_out, tl.permute(value, (0, 2, 1)), input_precision=PRECISION)
                of_score = (share * (of_share - mean)).to(key.dtype)
                summed = tl.dot(of_score, key, summed, input_precision=PRECISION)
            store_rows(of_q, tl.sum(summed, 0) * factor, row, n_q, q_stride, WIDTH, COLUMNS)
    elif (block - blocks) * BLOCK < n_k:
        row = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        key = load_rows(k, row, n_k, k_stride, WIDTH, COLUMNS, False)
        value = load_rows(v, row, n_k, k_stride, WIDTH, COLUMNS, False)
        of_key = tl.full([BLOCK, COLUMNS], 0.0, tl.float32)
        of_value = tl.full([BLOCK, COLUMNS], 0.0, tl.float32)
        for start in range(0, n_q, QUERIES):
            place = start + tl.arange(0, QUERIES)
            output = load_rows(out, place, n_q, out_stride, WIDTH, COLUMNS, False)
            of_out = load_rows(gradient, place, n_q, out_stride, WIDTH, COLUMNS, False)
            mean = tl.sum(output.to(tl.float32) * of_out.to(tl.float32), 1)
            query = load_rows(q, place, n_q, q_stride, WIDTH, COLUMNS, False)
            height = tl.load(level + place, mask=place < n_q, other=float("inf"))  # shares of 0
            score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            of_share = tl.dot(value, tl.trans(of_out), input_precision=PRECISION)
            share = tl.exp2(score * scale - height[None, :])
            of_value = tl.dot(share.to(of_out.dtype), of_out, of_value, input_precision=PRECISION)
            of_score = (share * (of_share - mean[None, :])).to(query.dtype)
            of_key = tl.dot(of_score, query, of_key, input_precision=PRECISION)
        store_rows(of_k, of_key * factor, row, n_k, k_stride, WIDTH, COLUMNS)
        store_rows(of_v, of_value, row, n_k, k_stride, WIDTH, COLUMNS)


class Segments(NamedTuple):
    """Which queries and keys belong together.

    Attributes:
        q_offsets: of the queries of each segment and, behind them, of those that pad (B + 2,).
        k_offsets: of its keys, likewise.
        longest_q: queries that no segment exceeds.
        longest_k: keys that no segment exceeds.
    """

    q_offsets: Tensor
    k_offsets: Tensor
    longest_q: int
    longest_k: int


class Reader:
    """What the queries of one layer after the other attend to, each in that layer's keys and values.

    Those of all layers get one gradient, of which each layer writes its columns: every one has to be read.

    Args:
        kv_TC: keys (T, D) of the first layer, its values, keys of the second, and so on, side by side.
        segments: of queries and keys.
        heads: that share D.
    """

    def __init__(self, kv_TC: Tensor, segments: Segments, heads: int):
        self.kv_TC, self.segments, self.heads = kv_TC.contiguous(), segments, heads
        self.first = 0

    def __call__(self, q_QD: Tensor) -> Tensor:
        """Outputs (Q, D) of the next layer's queries."""
        out_QD, self.kv_TC = _Attend.apply(q_QD, self.kv_TC, self.first, self.segments, self.heads)
        self.first += 2 * q_QD.shape[1]
        return out_QD


class _Attend(torch.autograd.Function):
    """Outputs, and the keys and values as they are, so that their gradient goes from layer to layer."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, first: int, segments: Segments, heads: int
    ) -> tuple[Tensor, Tensor]:
        q = q.contiguous()
        out, level = q.new_empty(q.shape), q.new_empty(heads, len(q), dtype=torch.float32)
        k, v = _columns(kv, first, q.shape[1])
        scale, _ = scales(q, heads)
        grid = (heads, triton.cdiv(segments.longest_q, QUERIES), len(segments.q_offsets) - 1)
        _forward[grid](
            q, k, v, out, level, *segments[:2], q.stride(0), kv.stride(0), len(q), scale,
            **_constants(q, heads),
        )  # fmt: skip
        ctx.save_for_backward(q, kv, out, level)
        ctx.first, ctx.segments, ctx.heads = first, segments, heads
        ctx.set_materialize_grads(False)
        return out, kv

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_kv = gradients
        q, kv, out, level = ctx.saved_tensors
        of_q, of_kv = torch.empty_like(q), torch.empty_like(kv) if of_kv is None else of_kv
        of_k, of_v = _columns(of_kv, ctx.first, q.shape[1])
        k, v = _columns(kv, ctx.first, q.shape[1])
        segments, (scale, factor) = ctx.segments, scales(q, ctx.heads)
        blocks = triton.cdiv(segments.longest_q, QUERIES)
        grid = (ctx.heads, blocks + triton.cdiv(segments.longest_k, BLOCK), len(segments.q_offsets) - 1)
        _backward[grid](
            q, k, v, out, gradient.contiguous(), level, of_q, of_k, of_v, *segments[:2],
            q.stride(0), kv.stride(0), len(q), blocks, scale, factor,
            BLOCK=BLOCK, **_constants(q, ctx.heads),
        )  # fmt: skip
        return of_q, of_kv, None, None, None


def _columns(kv: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    return kv[:, first : first + width], kv[:, first + width : first + 2 * width]


def _constants(q: Tensor, heads: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    width, tiles = q.shape[1] // heads, SINGLE if q.dtype == torch.float32 else TILES
    return {
        "WIDTH": width,
        "COLUMNS": columns_of(width),
        "QUERIES": QUERIES,
        "KEYS": tiles.keys,
        "WARPS": tiles.warps,
        "PRECISION": PRECISION,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def check(device: torch.device, kind: torch.dtype) -> None:
    """See that outputs and gradients of a small problem in type `kind` are those of float64.

    Raises:
        RuntimeError: they are not.
    """
    q_offsets = torch.tensor([0, 5, 5, 21, 58, 79], device=device)
    k_offsets = torch.tensor([0, 100, 109, 110, 174, 324], device=device)
    q, kv = drawn((79, 32), (324, 64), device=device, kind=kind)
    found = Reader(kv, Segments(q_offsets, k_offsets, 64, 128), 2)(q)
    see_exact(found, (q, *_columns(kv, 0, 32)), (q_offsets, k_offsets), 2, q, kv)
