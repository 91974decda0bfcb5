"""Exact attention of packed queries to the packed keys and values of their segment (a crystal, a text).

As FlashAttention-2 (Dao 2023): scores stay in registers, and a softmax is summed up over blocks of keys. A
program has one head of a block of rows: of queries, whose outputs or gradients it sums over the segment's
keys, or of keys, whose gradients it sums over its queries. Where queries are few, a program's warps share the
keys. So the gradient makes scores twice, but each row is written by one program, and nothing is added to what
another wrote: the bits are always the same.

Packed rows (rows, columns) have the heads side by side in their columns, and may be slices of wider ones.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from castbench.kernels import PRECISION, compare

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """Rows of queries and of keys that a program has in hand, its warps and the depth of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# Of outputs, of the gradients of queries, and of those of keys and values.
OWN = (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3))
SINGLE = (Tiles(64, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(32, 16, 8, 2))  # in float32, which fills registers
# Of few queries: these, keys of a warp at a time, warps and the depth of loads; and keys of a program that
# sums up their gradients. In float32 their products are three of bfloat16 parts, exact to 2^-16.
FEW, FEW_SINGLE = Tiles(16, 32, 2, 2), Tiles(16, 16, 4, 2)
BLOCK = 64
PARTS = "bf16x3"


@triton.jit
def _segment(offsets, segment):
    """First row and number of rows."""
    start = tl.load(offsets + segment).to(tl.int64)
    return start, (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)


@triton.jit
def _load(x, row, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a head; zeros for those from n on, of which there are none if WHOLE."""
    column = tl.arange(0, COLUMNS)[None, :]
    places = x + row[:, None] * stride + column
    if WHOLE and WIDTH == COLUMNS:
        tile = tl.load(places)
    elif WIDTH == COLUMNS:
        tile = tl.load(places, mask=row[:, None] < n, other=0.0)
    else:
        tile = tl.load(places, mask=(row[:, None] < n) & (column < WIDTH), other=0.0)
    return tile


@triton.jit
def _store(x, tile, row, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    mask = row[:, None] < n
    if WIDTH != COLUMNS:
        mask = mask & (column < WIDTH)
    tl.store(x + row[:, None] * stride + column, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _clear(x, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in this program's part of a segment's n rows."""
    for start in range(tl.program_id(1) * ROWS, n, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        _store(x, tl.full([ROWS, COLUMNS], 0.0, tl.float32), row, n, stride, WIDTH, COLUMNS)


@triton.jit
def _read(
    q, peak, total, found, k, v, start, n, stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The queries' largest score, and their sums of shares and of values, with one more block of keys."""
    row = start + tl.arange(0, KEYS)
    key = _load(k, row, n, stride, WIDTH, COLUMNS, WHOLE)
    value = _load(v, row, n, stride, WIDTH, COLUMNS, WHOLE)
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    if not WHOLE:
        score = tl.where(row[None, :] < n, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1) * scale)
    share = tl.exp2(score * scale - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(share, 1)
    found = tl.dot(share.to(value.dtype), value, found * fade[:, None], input_precision=PRECISION)
    return higher, total, found


@triton.jit(do_not_specialize=["rows"])
def _forward(
    q, k, v, out, level, q_offsets, k_offsets, q_stride, k_stride, rows, scale,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and the log2 of each query's sum of exponentials (heads, rows)."""
    head, block = tl.program_id(0), tl.program_id(1)
    segment = tl.num_programs(2) - 1 - tl.program_id(2)  # long texts, which come last, first
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = _segment(q_offsets, segment)
    k_start, n_k = _segment(k_offsets, segment)
    out += q_start * out_stride + head * WIDTH
    if PADDED and segment == tl.num_programs(2) - 1:
        _clear(out, n_q, out_stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n_q:
        k += k_start * k_stride + head * WIDTH
        v += k_start * k_stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = _load(q + q_start * q_stride + head * WIDTH, row, n_q, q_stride, WIDTH, COLUMNS, False)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.full([QUERIES], 0.0, tl.float32)
        found = tl.full([QUERIES, COLUMNS], 0.0, tl.float32)
        whole = n_k // KEYS * KEYS
        for start in range(0, whole, KEYS):
            peak, total, found = _read(
                query, peak, total, found, k, v, start, n_k, k_stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, True,
            )  # fmt: skip
        if whole < n_k:
            peak, total, found = _read(
                query, peak, total, found, k, v, whole, n_k, k_stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, False,
            )  # fmt: skip
        total = tl.where(n_k > 0, total, 1.0)  # who has nothing to attend to finds 0
        _store(out, found / total[:, None], row, n_q, out_stride, WIDTH, COLUMNS)
        level += head.to(tl.int64) * rows + q_start
        tl.store(level + row, peak + tl.log2(total), mask=row < n_q)


@triton.jit
def _of_block_of_keys(
    q, gradient, level, mean, summed, k, v, start, n, stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sum that is the queries' gradient with one more block of keys."""
    row = start + tl.arange(0, KEYS)
    key = _load(k, row, n, stride, WIDTH, COLUMNS, WHOLE)
    value = _load(v, row, n, stride, WIDTH, COLUMNS, WHOLE)
    share = tl.exp2(tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale - level[:, None])
    if not WHOLE:
        share = tl.where(row[None, :] < n, share, 0.0)
    of_share = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    of_score = share * (of_share - mean[:, None])
    return tl.dot(of_score.to(key.dtype), key, summed, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows"])
def _of_queries(
    q, k, v, out, gradient, level, mean, of_q, q_offsets, k_offsets, q_stride, k_stride, rows, scale, factor,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and the mean gradient of each one's shares (heads, rows)."""
    head, block = tl.program_id(0), tl.program_id(1)
    segment = tl.num_programs(2) - 1 - tl.program_id(2)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = _segment(q_offsets, segment)
    k_start, n_k = _segment(k_offsets, segment)
    of_q += q_start * q_stride + head * WIDTH
    if PADDED and segment == tl.num_programs(2) - 1:
        _clear(of_q, n_q, q_stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n_q:
        k += k_start * k_stride + head * WIDTH
        v += k_start * k_stride + head * WIDTH
        shift = q_start * out_stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = _load(q + q_start * q_stride + head * WIDTH, row, n_q, q_stride, WIDTH, COLUMNS, False)
        output = _load(out + shift, row, n_q, out_stride, WIDTH, COLUMNS, False)
        of_out = _load(gradient + shift, row, n_q, out_stride, WIDTH, COLUMNS, False)
        of_query = tl.sum(output.to(tl.float32) * of_out.to(tl.float32), 1)
        places = head.to(tl.int64) * rows + q_start + row
        tl.store(mean + places, of_query, mask=row < n_q)
        height = tl.load(level + places, mask=row < n_q, other=0.0)
        summed = tl.full([QUERIES, COLUMNS], 0.0, tl.float32)
        whole = n_k // KEYS * KEYS
        for start in range(0, whole, KEYS):
            summed = _of_block_of_keys(
                query, of_out, height, of_query, summed, k, v, start, n_k, k_stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, True,
            )  # fmt: skip
        if whole < n_k:
            summed = _of_block_of_keys(
                query, of_out, height, of_query, summed, k, v, whole, n_k, k_stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, False,
            )  # fmt: skip
        _store(of_q, summed * factor, row, n_q, q_stride, WIDTH, COLUMNS)


@triton.jit
def _of_block_of_queries(
    key, value, of_key, of_value, q, gradient, level, mean, start, n, q_stride, out_stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums that are the keys' and values' gradients with one more block of queries."""
    row = start + tl.arange(0, QUERIES)
    query = _load(q, row, n, q_stride, WIDTH, COLUMNS, WHOLE)
    of_out = _load(gradient, row, n, out_stride, WIDTH, COLUMNS, WHOLE)
    if WHOLE:
        height, of_query = tl.load(level + row), tl.load(mean + row)
    else:
        height = tl.load(level + row, mask=row < n, other=float("inf"))  # shares of 0
        of_query = tl.load(mean + row, mask=row < n, other=0.0)
    score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    of_share = tl.dot(value, tl.trans(of_out), input_precision=PRECISION)
    share = tl.exp2(score * scale - height[None, :])
    of_value = tl.dot(share.to(of_out.dtype), of_out, of_value, input_precision=PRECISION)
    of_score = share * (of_share - of_query[None, :])
    of_key = tl.dot(of_score.to(query.dtype), query, of_key, input_precision=PRECISION)
    return of_key, of_value


@triton.jit(do_not_specialize=["rows"])
def _of_keys(
    q, k, v, gradient, level, mean, of_k, of_v, q_offsets, k_offsets, q_stride, k_stride, rows, scale, factor,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values."""
    head, block = tl.program_id(0), tl.program_id(1)
    segment = tl.num_programs(2) - 1 - tl.program_id(2)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = _segment(q_offsets, segment)
    k_start, n_k = _segment(k_offsets, segment)
    shift = k_start * k_stride + head * WIDTH
    of_k += shift
    of_v += shift
    if PADDED and segment == tl.num_programs(2) - 1:
        _clear(of_k, n_k, k_stride, WIDTH, COLUMNS, KEYS)
        _clear(of_v, n_k, k_stride, WIDTH, COLUMNS, KEYS)
    elif block * KEYS < n_k:
        q += q_start * q_stride + head * WIDTH
        gradient += q_start * out_stride + head * WIDTH
        level += head.to(tl.int64) * rows + q_start
        mean += head.to(tl.int64) * rows + q_start
        row = block * KEYS + tl.arange(0, KEYS)
        key = _load(k + shift, row, n_k, k_stride, WIDTH, COLUMNS, False)
        value = _load(v + shift, row, n_k, k_stride, WIDTH, COLUMNS, False)
        of_key = tl.full([KEYS, COLUMNS], 0.0, tl.float32)
        of_value = tl.full([KEYS, COLUMNS], 0.0, tl.float32)
        whole = n_q // QUERIES * QUERIES
        for start in range(0, whole, QUERIES):
            of_key, of_value = _of_block_of_queries(
                key, value, of_key, of_value, q, gradient, level, mean, start, n_q, q_stride, out_stride,
                scale, WIDTH, COLUMNS, QUERIES, PRECISION, True,
            )  # fmt: skip
        if whole < n_q:
            of_key, of_value = _of_block_of_queries(
                key, value, of_key, of_value, q, gradient, level, mean, whole, n_q, q_stride, out_stride,
                scale, WIDTH, COLUMNS, QUERIES, PRECISION, False,
            )  # fmt: skip
        _store(of_k, of_key * factor, row, n_k, k_stride, WIDTH, COLUMNS)
        _store(of_v, of_value, row, n_k, k_stride, WIDTH, COLUMNS)


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
def _forward_of_few(
    q, k, v, out, level, q_offsets, k_offsets, q_stride, k_stride, rows, scale,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_forward`, of so few queries that warps share the keys, and put together what they found."""
    head, block = tl.program_id(0), tl.program_id(1)
    segment = tl.num_programs(2) - 1 - tl.program_id(2)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = _segment(q_offsets, segment)
    k_start, n_k = _segment(k_offsets, segment)
    out += q_start * out_stride + head * WIDTH
    if PADDED and segment == tl.num_programs(2) - 1:
        _clear(out, n_q, out_stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n_q:
        k += k_start * k_stride + head * WIDTH
        v += k_start * k_stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = _load(q + q_start * q_stride + head * WIDTH, row, n_q, q_stride, WIDTH, COLUMNS, False)
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
        _store(out, found, row, n_q, out_stride, WIDTH, COLUMNS)
        level += head.to(tl.int64) * rows + q_start
        tl.store(level + row, highest + tl.log2(total), mask=row < n_q)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward_of_few(
    q, k, v, out, gradient, level, of_q, of_k, of_v, q_offsets, k_offsets, q_stride, k_stride, rows, blocks,
    scale, factor, PADDED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, by the first `blocks` programs of a segment, and of keys and values.

    Those of QUERIES queries are summed as in `_forward_of_few`, those of BLOCK keys over blocks of queries.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    segment = tl.num_programs(2) - 1 - tl.program_id(2)
    out_stride = tl.num_programs(0) * WIDTH
    q_start, n_q = _segment(q_offsets, segment)
    k_start, n_k = _segment(k_offsets, segment)
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
    if PADDED and segment == tl.num_programs(2) - 1:
        _clear(of_q, n_q, q_stride, WIDTH, COLUMNS, QUERIES)
        _clear(of_k, n_k, k_stride, WIDTH, COLUMNS, BLOCK)
        _clear(of_v, n_k, k_stride, WIDTH, COLUMNS, BLOCK)
    elif block < blocks:
        if block * QUERIES < n_q:
            row = block * QUERIES + tl.arange(0, QUERIES)
            query = _load(q, row, n_q, q_stride, WIDTH, COLUMNS, False)
            output = _load(out, row, n_q, out_stride, WIDTH, COLUMNS, False)
            of_out = _load(gradient, row, n_q, out_stride, WIDTH, COLUMNS, False)
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
            _store(of_q, tl.sum(summed, 0) * factor, row, n_q, q_stride, WIDTH, COLUMNS)
    elif (block - blocks) * BLOCK < n_k:
        row = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        key = _load(k, row, n_k, k_stride, WIDTH, COLUMNS, False)
        value = _load(v, row, n_k, k_stride, WIDTH, COLUMNS, False)
        of_key = tl.full([BLOCK, COLUMNS], 0.0, tl.float32)
        of_value = tl.full([BLOCK, COLUMNS], 0.0, tl.float32)
        for start in range(0, n_q, QUERIES):
            place = start + tl.arange(0, QUERIES)
            output = _load(out, place, n_q, out_stride, WIDTH, COLUMNS, False)
            of_out = _load(gradient, place, n_q, out_stride, WIDTH, COLUMNS, False)
            mean = tl.sum(output.to(tl.float32) * of_out.to(tl.float32), 1)
            query = _load(q, place, n_q, q_stride, WIDTH, COLUMNS, False)
            height = tl.load(level + place, mask=place < n_q, other=float("inf"))  # shares of 0
            score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            of_share = tl.dot(value, tl.trans(of_out), input_precision=PRECISION)
            share = tl.exp2(score * scale - height[None, :])
            of_value = tl.dot(share.to(of_out.dtype), of_out, of_value, input_precision=PRECISION)
            of_score = (share * (of_share - mean[None, :])).to(query.dtype)
            of_key = tl.dot(of_score, query, of_key, input_precision=PRECISION)
        _store(of_k, of_key * factor, row, n_k, k_stride, WIDTH, COLUMNS)
        _store(of_v, of_value, row, n_k, k_stride, WIDTH, COLUMNS)


class Segments(NamedTuple):
    """Which queries and keys belong together.

    Attributes:
        q_offsets: (B + 1,) of the queries of each segment.
        k_offsets: (B + 1,) of its keys.
        longest_q: queries that no segment exceeds.
        longest_k: keys that no segment exceeds.
        padded: the last segment is none, of any size: its outputs and gradients are 0.
    """

    q_offsets: Tensor
    k_offsets: Tensor
    longest_q: int
    longest_k: int
    padded: bool


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
        scale, _ = _scales(q, heads)
        grid = (heads, triton.cdiv(segments.longest_q, FEW.queries), len(segments.q_offsets) - 1)
        _forward_of_few[grid](
            q, k, v, out, level, *segments[:2], q.stride(0), kv.stride(0), len(q), scale,
            **_constants_of_few(q, segments, heads),
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
        segments, (scale, factor) = ctx.segments, _scales(q, ctx.heads)
        blocks = triton.cdiv(segments.longest_q, FEW.queries)
        grid = (ctx.heads, blocks + triton.cdiv(segments.longest_k, BLOCK), len(segments.q_offsets) - 1)
        _backward_of_few[grid](
            q, k, v, out, gradient.contiguous(), level, of_q, of_k, of_v, *segments[:2],
            q.stride(0), kv.stride(0), len(q), blocks, scale, factor,
            BLOCK=BLOCK, **_constants_of_few(q, segments, ctx.heads),
        )  # fmt: skip
        return of_q, of_kv, None, None, None


def _columns(kv: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    return kv[:, first : first + width], kv[:, first + width : first + 2 * width]


def _constants_of_few(q: Tensor, segments: Segments, heads: int) -> dict[str, Any]:
    """What the kernels of few queries are compiled for."""
    width, tiles = q.shape[1] // heads, FEW_SINGLE if q.dtype == torch.float32 else FEW
    return {
        "PADDED": segments.padded,
        "WIDTH": width,
        "COLUMNS": max(triton.next_power_of_2(width), 16),
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "WARPS": tiles.warps,
        "PRECISION": PARTS,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def attend_own(qkv_TC: Tensor, offsets: Tensor, longest: int, heads: int) -> Tensor:
    """Outputs (T, D) of tokens that attend to those of their own text; one operator for torch.compile.

    Args:
        qkv_TC: queries, keys and values side by side (T, 3 D).
        offsets: of the texts and, behind them, of tokens that pad (B + 2,), which may be none.
        longest: tokens that no text exceeds.
        heads: that share D.
    """
    return _own(qkv_TC, offsets, longest, heads)[0]


@torch.library.custom_op("castbench::attend_own", mutates_args=())
def _own(qkv: Tensor, offsets: Tensor, longest: int, heads: int) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.contiguous().chunk(3, dim=1)
    return _outputs(q, k, v, Segments(offsets, offsets, longest, longest, True), heads)


@_own.register_fake
def _(qkv: Tensor, offsets: Tensor, longest: int, heads: int) -> tuple[Tensor, Tensor]:
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    return qkv.new_empty(rows, width), qkv.new_empty(heads, rows, dtype=torch.float32)


@torch.library.custom_op("castbench::attend_own_gradient", mutates_args=())
def _own_gradient(
    gradient: Tensor, qkv: Tensor, out: Tensor, level: Tensor, offsets: Tensor, longest: int, heads: int
) -> Tensor:
    qkv = qkv.contiguous()
    of_qkv = torch.empty_like(qkv)
    (q, k, v), (of_q, of_k, of_v) = qkv.chunk(3, dim=1), of_qkv.chunk(3, dim=1)
    segments = Segments(offsets, offsets, longest, longest, True)
    _gradients(gradient, q, k, v, out, level, of_q, of_k, of_v, segments, heads)
    return of_qkv


@_own_gradient.register_fake
def _(
    gradient: Tensor, qkv: Tensor, out: Tensor, level: Tensor, offsets: Tensor, longest: int, heads: int
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, ctx.longest, ctx.heads = inputs
    ctx.save_for_backward(qkv, *output, offsets)


def _own_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, out, level, offsets = ctx.saved_tensors
    return _own_gradient(gradient, qkv, out, level, offsets, ctx.longest, ctx.heads), None, None, None


_own.register_autograd(_own_backward, setup_context=_keep)


def _outputs(q: Tensor, k: Tensor, v: Tensor, segments: Segments, heads: int) -> tuple[Tensor, Tensor]:
    """Outputs (Q, D), and log2 of each query's sum of exponentials (heads, Q)."""
    out, level = q.new_empty(q.shape), q.new_empty(heads, len(q), dtype=torch.float32)
    scale, _ = _scales(q, heads)
    grid, constants = _constants(q, segments, heads, 0)
    _forward[grid](
        q, k, v, out, level, segments.q_offsets, segments.k_offsets,
        q.stride(0), k.stride(0), len(q), scale, **constants,
    )  # fmt: skip
    return out, level


def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, level: Tensor,
    of_q: Tensor, of_k: Tensor, of_v: Tensor, segments: Segments, heads: int,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v to places with their strides, from that of the outputs."""
    gradient, mean = gradient.contiguous(), torch.empty_like(level)
    offsets, strides = (segments.q_offsets, segments.k_offsets), (q.stride(0), k.stride(0))
    scale, factor = _scales(q, heads)
    grid, constants = _constants(q, segments, heads, 1)
    _of_queries[grid](
        q, k, v, out, gradient, level, mean, of_q, *offsets, *strides, len(q), scale, factor, **constants
    )
    grid, constants = _constants(q, segments, heads, 2)
    _of_keys[grid](
        q, k, v, gradient, level, mean, of_k, of_v, *offsets, *strides, len(q), scale, factor, **constants
    )


def _scales(q: Tensor, heads: int) -> tuple[float, float]:
    """What a product of query and key is multiplied with, as an exponent of 2, and of e."""
    factor = (q.shape[1] // heads) ** -0.5
    return factor * LOG2E, factor


def _constants(
    q: Tensor, segments: Segments, heads: int, kernel: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Programs (heads, blocks, segments), and what the kernel (0 to 2) is compiled for."""
    width = q.shape[1] // heads
    tiles = (SINGLE if q.dtype == torch.float32 else OWN)[kernel]
    longest, rows = (segments.longest_k, tiles.keys) if kernel == 2 else (segments.longest_q, tiles.queries)
    constants = {
        "PADDED": segments.padded,
        "WIDTH": width,
        "COLUMNS": max(triton.next_power_of_2(width), 16),
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "PRECISION": PRECISION,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return (heads, triton.cdiv(longest, rows), len(segments.q_offsets) - 1), constants


def check(device: torch.device, kind: torch.dtype) -> None:
    """See that outputs and gradients of a small problem in type `kind` are those of float64.

    Raises:
        RuntimeError: they are not.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, kind).requires_grad_()

    def see(found: Tensor, exact: Tensor, *inputs: Tensor) -> None:
        weights = torch.randn(exact.shape, generator=generator).to(device)
        ours, wanted = (
            [y, *torch.autograd.grad((y.double() * weights).sum(), inputs)] for y in (found, exact)
        )
        compare(ours, wanted, kind)

    nodes, tokens, width = (5, 0, 16, 37, 21), (100, 9, 1, 64, 150), 32
    q_offsets, k_offsets = (
        functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device) for lengths in (nodes, tokens)
    )
    segments = Segments(q_offsets, k_offsets, 64, 128, True)
    q, kv = drawn(sum(nodes), width), drawn(sum(tokens), 2 * width)
    see(Reader(kv, segments, 2)(q), _explicit(q, *_columns(kv, 0, width), segments, 2), q, kv)
    qkv, segments = drawn(sum(tokens), 3 * 128), Segments(k_offsets, k_offsets, 128, 128, True)
    q, k, v = qkv.chunk(3, dim=1)
    see(attend_own(qkv, k_offsets, 128, 2), _explicit(q, k, v, segments, 2), qkv)


def _explicit(q: Tensor, k: Tensor, v: Tensor, segments: Segments, heads: int) -> Tensor:
    """Outputs (Q, D) in float64, one segment after the other."""
    q_lengths, k_lengths = (offsets.diff().tolist() for offsets in segments[:2])
    q, k, v = (part.double().unflatten(1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
    parts = zip(q.split(q_lengths, 1), k.split(k_lengths, 1), v.split(k_lengths, 1), strict=True)
    found = [(a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c for a, b, c in parts]
    if segments.padded:
        found[-1] = found[-1] * 0
    return torch.cat(found, 1).transpose(0, 1).flatten(1)
