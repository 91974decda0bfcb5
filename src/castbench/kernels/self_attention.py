"""Exact self-attention of packed texts: each token attends to those of its own text (see `segments.py`)."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from castbench.kernels import PRECISION
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
    """Rows of queries and of keys that a program has in hand, its warps and the depth of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# Of outputs, of the gradients of queries, and of those of keys and values.
TILES = (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3))
SINGLE = (Tiles(64, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(32, 16, 8, 2))  # in float32, which fills registers


@triton.jit
def _read(
    q, peak, total, found, k, v, start, n, stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The queries' largest score, and their sums of shares and of values, with one more block of keys."""
    row = start + tl.arange(0, KEYS)
    key = load_rows(k, row, n, stride, WIDTH, COLUMNS, WHOLE)
    value = load_rows(v, row, n, stride, WIDTH, COLUMNS, WHOLE)
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
    q, k, v, out, level, offsets, stride, rows, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and the log2 of each query's sum of exponentials (heads, rows)."""
    head, block = tl.program_id(0), tl.program_id(1)
    out_stride = tl.num_programs(0) * WIDTH
    first, n = own_rows(offsets)
    out += first * out_stride + head * WIDTH
    if tl.program_id(2) == 0:  # rows that pad
        clear_rows(out, n, out_stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n:
        k += first * stride + head * WIDTH
        v += first * stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = load_rows(q + first * stride + head * WIDTH, row, n, stride, WIDTH, COLUMNS, False)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.full([QUERIES], 0.0, tl.float32)
        found = tl.full([QUERIES, COLUMNS], 0.0, tl.float32)
        whole = n // KEYS * KEYS
        for start in range(0, whole, KEYS):
            peak, total, found = _read(
                query, peak, total, found, k, v, start, n, stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, True,
            )  # fmt: skip
        if whole < n:
            peak, total, found = _read(
                query, peak, total, found, k, v, whole, n, stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, False,
            )  # fmt: skip
        store_rows(out, found / total[:, None], row, n, out_stride, WIDTH, COLUMNS)
        level += head.to(tl.int64) * rows + first
        tl.store(level + row, peak + tl.log2(total), mask=row < n)


@triton.jit
def _of_block_of_keys(
    q, gradient, level, mean, summed, k, v, start, n, stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sum that is the queries' gradient with one more block of keys."""
    row = start + tl.arange(0, KEYS)
    key = load_rows(k, row, n, stride, WIDTH, COLUMNS, WHOLE)
    value = load_rows(v, row, n, stride, WIDTH, COLUMNS, WHOLE)
    share = tl.exp2(tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale - level[:, None])
    if not WHOLE:
        share = tl.where(row[None, :] < n, share, 0.0)
    of_share = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    of_score = share * (of_share - mean[:, None])
    return tl.dot(of_score.to(key.dtype), key, summed, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows"])
def _of_queries(
    q, k, v, out, gradient, level, mean, of_q, offsets, stride, rows, scale, factor,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and the mean gradient of each one's shares (heads, rows)."""
    head, block = tl.program_id(0), tl.program_id(1)
    out_stride = tl.num_programs(0) * WIDTH
    first, n = own_rows(offsets)
    of_q += first * stride + head * WIDTH
    if tl.program_id(2) == 0:  # rows that pad
        clear_rows(of_q, n, stride, WIDTH, COLUMNS, QUERIES)
    elif block * QUERIES < n:
        k += first * stride + head * WIDTH
        v += first * stride + head * WIDTH
        shift = first * out_stride + head * WIDTH
        row = block * QUERIES + tl.arange(0, QUERIES)
        query = load_rows(q + first * stride + head * WIDTH, row, n, stride, WIDTH, COLUMNS, False)
        output = load_rows(out + shift, row, n, out_stride, WIDTH, COLUMNS, False)
        of_out = load_rows(gradient + shift, row, n, out_stride, WIDTH, COLUMNS, False)
        of_query = tl.sum(output.to(tl.float32) * of_out.to(tl.float32), 1)
        places = head.to(tl.int64) * rows + first + row
        tl.store(mean + places, of_query, mask=row < n)
        height = tl.load(level + places, mask=row < n, other=0.0)
        summed = tl.full([QUERIES, COLUMNS], 0.0, tl.float32)
        whole = n // KEYS * KEYS
        for start in range(0, whole, KEYS):
            summed = _of_block_of_keys(
                query, of_out, height, of_query, summed, k, v, start, n, stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, True,
            )  # fmt: skip
        if whole < n:
            summed = _of_block_of_keys(
                query, of_out, height, of_query, summed, k, v, whole, n, stride, scale,
                WIDTH, COLUMNS, KEYS, PRECISION, False,
            )  # fmt: skip
        store_rows(of_q, summed * factor, row, n, stride, WIDTH, COLUMNS)


@triton.jit
def _of_block_of_queries(
    key, value, of_key, of_value, q, gradient, level, mean, start, n, stride, out_stride, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums that are the keys' and values' gradients with one more block of queries."""
    row = start + tl.arange(0, QUERIES)
    query = load_rows(q, row, n, stride, WIDTH, COLUMNS, WHOLE)
    of_out = load_rows(gradient, row, n, out_stride, WIDTH, COLUMNS, WHOLE)
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
    q, k, v, gradient, level, mean, of_k, of_v, offsets, stride, rows, scale, factor,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values."""
    head, block = tl.program_id(0), tl.program_id(1)
    out_stride = tl.num_programs(0) * WIDTH
    first, n = own_rows(offsets)
    shift = first * stride + head * WIDTH
    of_k += shift
    of_v += shift
    if tl.program_id(2) == 0:  # rows that pad
        clear_rows(of_k, n, stride, WIDTH, COLUMNS, KEYS)
        clear_rows(of_v, n, stride, WIDTH, COLUMNS, KEYS)
    elif block * KEYS < n:
        q += first * stride + head * WIDTH
        gradient += first * out_stride + head * WIDTH
        level += head.to(tl.int64) * rows + first
        mean += head.to(tl.int64) * rows + first
        row = block * KEYS + tl.arange(0, KEYS)
        key = load_rows(k + shift, row, n, stride, WIDTH, COLUMNS, False)
        value = load_rows(v + shift, row, n, stride, WIDTH, COLUMNS, False)
        of_key = tl.full([KEYS, COLUMNS], 0.0, tl.float32)
        of_value = tl.full([KEYS, COLUMNS], 0.0, tl.float32)
        whole = n // QUERIES * QUERIES
        for start in range(0, whole, QUERIES):
            of_key, of_value = _of_block_of_queries(
                key, value, of_key, of_value, q, gradient, level, mean, start, n, stride, out_stride,
                scale, WIDTH, COLUMNS, QUERIES, PRECISION, True,
            )  # fmt: skip
        if whole < n:
            of_key, of_value = _of_block_of_queries(
                key, value, of_key, of_value, q, gradient, level, mean, whole, n, stride, out_stride,
                scale, WIDTH, COLUMNS, QUERIES, PRECISION, False,
            )  # fmt: skip
        store_rows(of_k, of_key * factor, row, n, stride, WIDTH, COLUMNS)
        store_rows(of_v, of_value, row, n, stride, WIDTH, COLUMNS)


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
    """Outputs (T, D), and log2 of each query's sum of exponentials (heads, T)."""
    qkv = qkv.contiguous()
    q, k, v = qkv.chunk(3, dim=1)
    out, level = q.new_empty(q.shape), q.new_empty(heads, len(q), dtype=torch.float32)
    grid, constants = _constants(q, offsets, longest, heads, 0)
    _forward[grid](q, k, v, out, level, offsets, qkv.stride(0), len(q), scales(q, heads)[0], **constants)
    return out, level


@_own.register_fake
def _(qkv: Tensor, offsets: Tensor, longest: int, heads: int) -> tuple[Tensor, Tensor]:
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    return qkv.new_empty(rows, width), qkv.new_empty(heads, rows, dtype=torch.float32)


@torch.library.custom_op("castbench::attend_own_gradient", mutates_args=())
def _own_gradient(
    gradient: Tensor, qkv: Tensor, out: Tensor, level: Tensor, offsets: Tensor, longest: int, heads: int
) -> Tensor:
    qkv, gradient, mean = qkv.contiguous(), gradient.contiguous(), torch.empty_like(level)
    of_qkv = torch.empty_like(qkv)
    (q, k, v), (of_q, of_k, of_v) = qkv.chunk(3, dim=1), of_qkv.chunk(3, dim=1)
    shared = offsets, qkv.stride(0), len(q), *scales(q, heads)
    grid, constants = _constants(q, offsets, longest, heads, 1)
    _of_queries[grid](q, k, v, out, gradient, level, mean, of_q, *shared, **constants)
    grid, constants = _constants(q, offsets, longest, heads, 2)
    _of_keys[grid](q, k, v, gradient, level, mean, of_k, of_v, *shared, **constants)
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


def _constants(
    q: Tensor, offsets: Tensor, longest: int, heads: int, kernel: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Programs (heads, blocks, segments), and what the kernel (0 to 2) is compiled for."""
    width = q.shape[1] // heads
    tiles = (SINGLE if q.dtype == torch.float32 else TILES)[kernel]
    constants = {
        "WIDTH": width,
        "COLUMNS": columns_of(width),
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "PRECISION": PRECISION,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    rows = tiles.keys if kernel == 2 else tiles.queries
    return (heads, triton.cdiv(longest, rows), len(offsets) - 1), constants


def check(device: torch.device, kind: torch.dtype) -> None:
    """See that outputs and gradients of a small problem in type `kind` are those of float64.

    Raises:
        RuntimeError: they are not.
    """
    offsets = torch.tensor([0, 100, 109, 110, 174, 324], device=device)
    (qkv,) = drawn((324, 3 * 128), device=device, kind=kind)
    q, k, v = qkv.chunk(3, dim=1)
    see_exact(attend_own(qkv, offsets, 128, 2), (q, k, v), (offsets, offsets), 2, qkv)
