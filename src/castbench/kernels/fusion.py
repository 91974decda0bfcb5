"""CAST's layers but for the attention itself, on packed node states: a kernel a layer each way.

Between the attention of one layer and that of the next, rows (nodes) have nothing to do with each other, so a
program takes ROWS of them through all of it: output product, feed-forward block, the next layer's norm and
query. Weights pass through a program in chunks, and the inner activation never leaves it. States are
float32, norms and GELU too; products have factors of the type of autocast and float32 sums, and float32
factors are taken as two parts (see `parts`), exact to 2^-16, of weights once a step.

The way back recomputes the inner activation and leaves, for each layer, the factors of the gradients of its
weights: these, sums over all nodes, are taken for all layers in one kernel at the end. No sum's order varies.

Sizes: N nodes, L layers, D width of a state, A width of attention, F width of the feed-forward block. The
weights of a layer lie one behind another, as do their gradients and what these are made of:
    matrices  query (A, D), output (D, A), first (F, D), second (D, F)
    vectors   query's norm: weight, bias (D); query's bias (A); output's bias (D); the feed-forward block's
              norm: weight, bias (D); first bias (F); second bias (D)
    factors   of each matrix two, whose product over rows is its gradient: query (A, D), output (D, A),
              first (F, D), second (D, F)
Of float32 the parts of all matrices of a layer lie behind one another, and those of a row of factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from castbench.kernels import compare, shared_memory
from castbench.kernels.parts import (
    dot_parts,
    load_parts,
    parts_of,
    split,
    store_parts,
    trans_parts,
)

ROWS = 16  # of a program: the fewest that matrix units take, since there are few nodes
PARTS = 2  # of a number in float32
CHUNK = {1: 128, 2: 64}  # by parts of a number: columns of the weights that pass through at most
WARPS, STAGES = 8, 3
SIDE, STEP = 64, 64  # of a program's square of a weight's gradient; rows that it adds at a time
DEPTH = 3  # stages of these
WIDEST = 128  # state that a program can hold


@triton.jit
def _normalised(x, EPS: tl.constexpr):
    """Rows with mean 0 and variance 1, and by what they were scaled."""
    D: tl.constexpr = x.shape[1]
    x -= (tl.sum(x, 1) / D)[:, None]
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
    return x * scale, scale


@triton.jit
def _before_norm(gradient, unit, scale):
    """Gradient of the rows of which `unit` were made, from that of `unit`."""
    D: tl.constexpr = unit.shape[1]
    along = (tl.sum(gradient * unit, 1) / D)[:, None]
    return (gradient - (tl.sum(gradient, 1) / D)[:, None] - unit * along) * scale


@triton.jit
def _ask(
    h, query, matrices, vectors, row, real, A: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
    EPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store the queries (., A) of the rows h (ROWS, D)."""
    D: tl.constexpr = h.shape[1]
    d, part = tl.arange(0, D), tl.arange(0, CHUNK)
    unit, _ = _normalised(h, EPS)
    x = split(unit * tl.load(vectors + d) + tl.load(vectors + D + d), matrices.dtype.element_ty, PARTS)
    for start in range(0, A, CHUNK):
        a = start + part
        weight = load_parts(matrices + a[None, :] * D + d[:, None], None, 2 * (A + F) * D, PARTS)
        q = dot_parts(x, weight, tl.zeros((h.shape[0], CHUNK), tl.float32), PARTS)
        q += tl.load(vectors + 2 * D + a)
        tl.store(query + row * A + a, q.to(query.dtype.element_ty), mask=real)


@triton.jit
def _ask_backward(
    h, d_query, matrices, vectors, factors, sums, row, real, A: tl.constexpr, F: tl.constexpr,
    CHUNK: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows h (ROWS, D) that comes through their queries."""
    D: tl.constexpr = h.shape[1]
    WIDTH: tl.constexpr = 2 * (A + D + D + F)
    kind: tl.constexpr = matrices.dtype.element_ty
    d, part = tl.arange(0, D), tl.arange(0, CHUNK)
    weight_d = tl.load(vectors + d)
    unit, scale = _normalised(h, EPS)
    factors += row * (PARTS * WIDTH)
    gradient = tl.zeros(h.shape, tl.float32)
    for start in range(0, A, CHUNK):
        a = start + part
        d_q = tl.load(d_query + row * A + a, mask=real, other=0.0)
        weight = load_parts(matrices + a[:, None] * D + d[None, :], None, 2 * (A + F) * D, PARTS)
        tl.store(sums + 2 * D + a, tl.sum(d_q.to(tl.float32), 0))
        d_q = split(d_q, kind, PARTS)
        store_parts(factors + a, d_q, real, WIDTH, PARTS)
        gradient = dot_parts(d_q, weight, gradient, PARTS)
    x = unit * weight_d + tl.load(vectors + D + d)
    store_parts(factors + A + d, split(x, kind, PARTS), real, WIDTH, PARTS)
    tl.store(sums + d, tl.sum(gradient * unit, 0))
    tl.store(sums + D + d, tl.sum(gradient, 0))
    return _before_norm(gradient * weight_d, unit, scale)


@triton.jit(do_not_specialize=["rows"])
def ask_forward(
    h, query, matrices, vectors, rows, D: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, CHUNK_A: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Queries (N, A) of states h (N, D)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    x = tl.load(h + row * D + tl.arange(0, D), mask=real, other=0.0)
    _ask(x, query, matrices, vectors, row, real, A, F, CHUNK_A, EPS, PARTS)


@triton.jit(do_not_specialize=["rows"])
def ask_backward(
    h, d_passed, d_query, d_h, matrices, vectors, factors, sums, rows, SUMS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, CHUNK_A: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of states h (N, D) from that of their queries, and of themselves behind these."""
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    place = row * D + tl.arange(0, D)
    x = tl.load(h + place, mask=real, other=0.0)
    gradient = tl.load(d_passed + place, mask=real, other=0.0)
    gradient += _ask_backward(
        x, d_query, matrices, vectors, factors, sums + tile * SUMS, row, real, A, F, CHUNK_A, EPS, PARTS
    )
    tl.store(d_h + place, gradient, mask=real)


@triton.jit(do_not_specialize=["rows"])
def layer_forward(
    h, attended, middle, out, query, matrices, vectors, next_matrices, next_vectors, rows, D: tl.constexpr,
    A: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, CHUNK_A: tl.constexpr, CHUNK_F: tl.constexpr,
    LAST: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """States behind the attention (middle) and behind the layer (out), and the next layer's queries."""
    APART: tl.constexpr = 2 * (A + F) * D
    kind: tl.constexpr = matrices.dtype.element_ty
    output, first, second = matrices + A * D, matrices + 2 * A * D, matrices + (2 * A + F) * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    d, part_A, part_F = tl.arange(0, D), tl.arange(0, CHUNK_A), tl.arange(0, CHUNK_F)

    x = tl.load(h + row * D + d, mask=real, other=0.0) + tl.load(vectors + 2 * D + A + d)
    for start in range(0, A, CHUNK_A):
        a = start + part_A
        found = tl.load(attended + row * A + a, mask=real, other=0.0)
        weight = load_parts(output + d[None, :] * A + a[:, None], None, APART, PARTS)
        x = dot_parts(split(found, kind, PARTS), weight, x, PARTS)
    tl.store(middle + row * D + d, x, mask=real)

    unit, _ = _normalised(x, EPS)
    n = unit * tl.load(vectors + 3 * D + A + d) + tl.load(vectors + 4 * D + A + d)
    n = split(n, kind, PARTS)
    x += tl.load(vectors + 5 * D + A + F + d)
    for start in range(0, F, CHUNK_F):
        f = start + part_F
        weight_1 = load_parts(first + f[None, :] * D + d[:, None], None, APART, PARTS)
        weight_2 = load_parts(second + d[None, :] * F + f[:, None], None, APART, PARTS)
        u = dot_parts(n, weight_1, tl.zeros((ROWS, CHUNK_F), tl.float32), PARTS)
        u += tl.load(vectors + 5 * D + A + f)
        g = u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))
        x = dot_parts(split(g, kind, PARTS), weight_2, x, PARTS)
    tl.store(out + row * D + d, x, mask=real)
    if not LAST:
        _ask(x, query, next_matrices, next_vectors, row, real, A, F, CHUNK_A, EPS, PARTS)


@triton.jit(do_not_specialize=["rows"])
def layer_backward(
    middle, out, attended, d_out, d_query, d_h, d_attended, matrices, vectors, factors, sums, next_matrices,
    next_vectors, next_factors, next_sums, rows, SUMS: tl.constexpr, D: tl.constexpr, A: tl.constexpr,
    F: tl.constexpr, ROWS: tl.constexpr, CHUNK_A: tl.constexpr, CHUNK_F: tl.constexpr, LAST: tl.constexpr,
    EPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of h (N, D) and attended (N, A); factors and sums (a row a program) of the weights'."""
    APART: tl.constexpr = 2 * (A + F) * D
    WIDTH: tl.constexpr = 2 * (A + D + D + F)
    kind: tl.constexpr = matrices.dtype.element_ty
    output, first, second = matrices + A * D, matrices + 2 * A * D, matrices + (2 * A + F) * D
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    d, part_A, part_F = tl.arange(0, D), tl.arange(0, CHUNK_A), tl.arange(0, CHUNK_F)
    factors += row * (PARTS * WIDTH)
    sums += tile * SUMS

    d_x = tl.load(d_out + row * D + d, mask=real, other=0.0)
    if not LAST:
        x = tl.load(out + row * D + d, mask=real, other=0.0)
        next_sums += tile * SUMS
        d_x += _ask_backward(
            x, d_query, next_matrices, next_vectors, next_factors, next_sums, row, real, A, F, CHUNK_A, EPS,
            PARTS,
        )  # fmt: skip
    tl.store(sums + 5 * D + A + F + d, tl.sum(d_x, 0))
    d_second = split(d_x, kind, PARTS)
    store_parts(factors + 2 * A + 3 * D + F + d, d_second, real, WIDTH, PARTS)

    unit, scale = _normalised(tl.load(middle + row * D + d, mask=real, other=0.0), EPS)
    weight_d = tl.load(vectors + 3 * D + A + d)
    n = split(unit * weight_d + tl.load(vectors + 4 * D + A + d), kind, PARTS)
    store_parts(factors + 2 * A + 2 * D + F + d, n, real, WIDTH, PARTS)
    gradient = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, F, CHUNK_F):
        f = start + part_F
        weight_1 = load_parts(first + f[:, None] * D + d[None, :], None, APART, PARTS)
        weight_2 = load_parts(second + d[:, None] * F + f[None, :], None, APART, PARTS)
        zeros = tl.zeros((ROWS, CHUNK_F), tl.float32)
        u = dot_parts(n, trans_parts(weight_1), zeros, PARTS) + tl.load(vectors + 5 * D + A + f)
        d_g = dot_parts(d_second, weight_2, zeros, PARTS)
        share = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        d_u = d_g * (share + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
        tl.store(sums + 5 * D + A + f, tl.sum(d_u, 0))
        d_first = split(d_u, kind, PARTS)
        store_parts(factors + 2 * A + 2 * D + f, d_first, real, WIDTH, PARTS)
        store_parts(factors + 2 * A + 4 * D + F + f, split(u * share, kind, PARTS), real, WIDTH, PARTS)
        gradient = dot_parts(d_first, weight_1, gradient, PARTS)
    tl.store(sums + 3 * D + A + d, tl.sum(gradient * unit, 0))
    tl.store(sums + 4 * D + A + d, tl.sum(gradient, 0))
    d_x += _before_norm(gradient * weight_d, unit, scale)

    tl.store(d_h + row * D + d, d_x, mask=real)
    tl.store(sums + 2 * D + A + d, tl.sum(d_x, 0))
    d_output = split(d_x, kind, PARTS)
    store_parts(factors + A + D + d, d_output, real, WIDTH, PARTS)
    for start in range(0, A, CHUNK_A):
        a = start + part_A
        found = tl.load(attended + row * A + a, mask=real, other=0.0)
        weight = load_parts(output + d[:, None] * A + a[None, :], None, APART, PARTS)
        store_parts(factors + A + 2 * D + a, split(found, kind, PARTS), real, WIDTH, PARTS)
        d_found = dot_parts(d_output, weight, tl.zeros((ROWS, CHUNK_A), tl.float32), PARTS)
        tl.store(d_attended + row * A + a, d_found.to(d_attended.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def weight_gradients(
    factors, gradients, rows, D: tl.constexpr, A: tl.constexpr, F: tl.constexpr, SIDE: tl.constexpr,
    STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients (L, .) of the matrices from their factors (L, N, .); a program a square of a matrix."""
    WIDTH: tl.constexpr = 2 * (A + D + D + F)
    SMALL: tl.constexpr = A * D // (SIDE * SIDE)  # squares of the query's matrix, and of the output's
    LARGE: tl.constexpr = F * D // (SIDE * SIDE)
    square = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    if square < SMALL:
        left, right, columns, before = 0, A, D, 0
    elif square < 2 * SMALL:
        left, right, columns, before = A + D, A + 2 * D, A, SMALL
    elif square < 2 * SMALL + LARGE:
        left, right, columns, before = 2 * A + 2 * D, 2 * A + 2 * D + F, D, 2 * SMALL
    else:
        left, right, columns, before = 2 * A + 3 * D + F, 2 * A + 4 * D + F, F, 2 * SMALL + LARGE
    across = columns // SIDE
    top = (square - before) // across * SIDE
    side = (square - before) % across * SIDE
    factors += layer * rows * (PARTS * WIDTH)
    place, step = tl.arange(0, SIDE), tl.arange(0, STEP)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, rows, STEP):
        row = start + step
        places = factors + row[:, None] * (PARTS * WIDTH) + place[None, :]
        a = load_parts(places + left + top, row[:, None] < rows, WIDTH, PARTS)
        b = load_parts(places + right + side, row[:, None] < rows, WIDTH, PARTS)
        total = dot_parts(trans_parts(a), b, total, PARTS)
    gradients += layer * (2 * (A + F) * D) + before * SIDE * SIDE
    tl.store(gradients + (top + place)[:, None] * columns + side + place[None, :], total)


def _chunk(d: int, parts: int, device: torch.device) -> int:
    """Columns of the weights that pass through at a time, of two matrices, while the next are loaded."""
    chunk = CHUNK[parts]
    if device.type == "cuda":
        room = shared_memory(device)
        while chunk > 16 and 8 * d * chunk * parts + 8704 * (parts + 1) > room:  # and what is no weight
            chunk //= 2
    return chunk


class _Step:
    """The layers of one forward pass, their sizes, and what their backward passes leave for `_Weights`."""

    def __init__(self, layers: Sequence[Any], rows: int, kind: torch.dtype):
        layer = layers[0]
        self.rows, self.kind, self.layers = rows, kind, len(layers)
        d, a, f = layer.query.in_features, layer.query.out_features, layer.feedforward[1].out_features
        self.shapes = [(a, d), (d, a), (f, d), (d, f), (d,), (d,), (a,), (d,), (d,), (d,), (f,), (d,)]
        self.matrices, self.vectors = 2 * (a + f) * d, 6 * d + a + f
        self.programs = (triton.cdiv(rows, ROWS),)
        self.factor_kind, parts = (torch.bfloat16, PARTS) if kind == torch.float32 else (kind, 1)
        chunk = _chunk(d, parts, layer.query.weight.device)
        sizes = {"D": d, "A": a, "F": f, "PARTS": parts}
        self.common = sizes | {"ROWS": ROWS, "EPS": layer.norm.eps, "CHUNK_A": min(chunk, a)}
        self.common |= {"num_warps": WARPS, "num_stages": STAGES}
        self.wide = {"CHUNK_F": min(chunk, f)}
        self.squares = sizes | {"SIDE": min(SIDE, a, d, f), "STEP": STEP, "num_stages": DEPTH}
        self.factors: Any = None
        self.sums: Any = None

    def parameters(self, layers: Sequence[Any]) -> list[Tensor]:
        """Those of all layers, each layer's in the order of `shapes`."""
        found = []
        for layer in layers:
            norm, first, _, second = layer.feedforward
            parts = (layer.query, layer.output, first, second)
            found += [part.weight for part in parts]
            found += [layer.norm.weight, layer.norm.bias, layer.query.bias, layer.output.bias]
            found += [norm.weight, norm.bias, first.bias, second.bias]
        return found

    def parts(self, matrices: Tensor, vectors: Tensor) -> list[Tensor]:
        """Views of matrices (L, .) and vectors (L, .) in the order of `parameters`."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        found = []
        for own in zip(matrices, vectors, strict=True):
            flat = [*own[0].split(sizes[:4]), *own[1].split(sizes[4:])]
            found += [part.view(shape) for part, shape in zip(flat, self.shapes, strict=True)]
        return found

    def room(self, like: Tensor) -> None:
        """Make room for what the backward passes leave, at the first of them."""
        if self.factors is None:
            width = self.squares["PARTS"] * sum(map(sum, self.shapes[:4]))
            self.factors = like.new_empty(self.layers, self.rows, width, dtype=self.factor_kind)
            self.sums = like.new_empty(*self.programs, self.layers, self.vectors)

    def gradients(self) -> list[Tensor]:
        """Those of the parameters, once all layers' backward passes have run."""
        factors, vectors = self.factors, self.sums.sum(0)
        self.factors = self.sums = None
        matrices = vectors.new_empty(self.layers, self.matrices)
        grid = (self.matrices // self.squares["SIDE"] ** 2, self.layers)
        weight_gradients[grid](factors, matrices, self.rows, **self.squares, num_warps=4)
        return self.parts(matrices, vectors)


class _Weights(torch.autograd.Function):
    """Parameters to matrices (L, .), of the type of products or parts, and vectors (L, .).

    Every layer reads these and gives them no gradient; by autograd's order this backward pass comes behind
    those of all layers nevertheless, and takes all gradients of weights from what they left.
    """

    @staticmethod
    def forward(ctx: Any, step: _Step, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        flat = [value.flatten() for axes in (2, 1) for value in parameters if value.dim() == axes]
        matrices, vectors = torch.cat(flat).split([step.layers * step.matrices, step.layers * step.vectors])
        matrices, vectors = matrices.view(step.layers, -1), vectors.view(step.layers, -1)
        matrices = parts_of(matrices, PARTS) if step.kind == torch.float32 else matrices.to(step.kind)
        return matrices, vectors

    @staticmethod
    def backward(ctx: Any, *_: None) -> tuple[Any, ...]:
        return None, *ctx.step.gradients()


class _Ask(torch.autograd.Function):
    """States h (N, D), as they are, and their queries (N, A) in the first layer."""

    @staticmethod
    def forward(ctx: Any, step: _Step, h: Tensor, matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.step = step
        ctx.save_for_backward(h, matrices, vectors)
        query = h.new_empty(step.rows, step.common["A"], dtype=step.kind)
        ask_forward[step.programs](h, query, matrices, vectors, step.rows, **step.common)
        return h.view_as(h), query

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        step, (h, matrices, vectors) = ctx.step, ctx.saved_tensors
        d_passed, d_query = (gradient.contiguous() for gradient in gradients)
        step.room(h)
        d_h = torch.empty_like(h)
        ask_backward[step.programs](
            h, d_passed, d_query, d_h, matrices, vectors, step.factors, step.sums, step.rows,
            SUMS=step.sums.stride(0), **step.common,
        )  # fmt: skip
        return None, d_h, None, None


class _Layer(torch.autograd.Function):
    """States (N, D) and what they attended to (N, A), to the next states and their queries, if any."""

    @staticmethod
    def forward(
        ctx: Any, step: _Step, place: int, h: Tensor, attended: Tensor, matrices: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        attended = attended.contiguous()
        middle, out = torch.empty_like(h), torch.empty_like(h)
        last = place + 1 == step.layers
        query = None if last else torch.empty_like(attended)
        layer_forward[step.programs](
            h, attended, middle, out, query, matrices[place], vectors[place],
            *_next(place, matrices, vectors), step.rows, LAST=last, **step.common, **step.wide,
        )  # fmt: skip
        ctx.step, ctx.place = step, place
        ctx.save_for_backward(middle, out, attended, matrices, vectors)
        return out, query

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        step, place, (middle, out, attended, matrices, vectors) = ctx.step, ctx.place, ctx.saved_tensors
        d_out, d_query = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        step.room(middle)
        sums = step.sums[0]
        d_h, d_attended = torch.empty_like(middle), torch.empty_like(attended)
        layer_backward[step.programs](
            middle, out, attended, d_out, d_query, d_h, d_attended, matrices[place], vectors[place],
            step.factors[place], sums[place], *_next(place, matrices, vectors, step.factors, sums),
            step.rows, SUMS=step.sums.stride(0), LAST=place + 1 == step.layers, **step.common, **step.wide,
        )  # fmt: skip
        return None, None, d_h, d_attended, None, None


def _next(place: int, *each: Tensor) -> list[Tensor | None]:
    """What of tensors (L, .) is the next layer's."""
    return [part[place + 1] if place + 1 < len(part) else None for part in each]


def fits(layer: Any) -> bool:
    """Whether a `CrossAttentionLayer` has sizes that the kernels take, and no dropout to draw."""
    widths = (layer.query.in_features, layer.query.out_features, layer.feedforward[1].out_features)
    powers = all(width >= 16 and width & (width - 1) == 0 for width in widths)
    return powers and widths[0] <= WIDEST and not (layer.training and layer.dropout.p)


def fuse(h: Tensor, layers: Sequence[Any], read: Callable[[Tensor], Tensor], kind: torch.dtype) -> Tensor:
    """Node states (N, D), float32, behind all layers.

    Args:
        h: (N, D).
        layers: each a `CrossAttentionLayer` that fits.
        read: called once a layer, queries (N, A) to what they attend to (N, A), both of type `kind`.
        kind: type of products.
    """
    step = _Step(layers, len(h), kind)
    matrices, vectors = _Weights.apply(step, *step.parameters(layers))
    h, query = _Ask.apply(step, h.float().contiguous(), matrices, vectors)
    for place in range(len(layers)):
        h, query = _Layer.apply(step, place, h, read(query), matrices, vectors)
    return h


def check(
    device: torch.device, kind: torch.dtype, rows: int = 77, n_node: int = 128, width: int = 128,
    feedforward: int = 512, layers: int = 2,
) -> None:  # fmt: skip
    """See that layers find what they do in plain torch and double precision; see `kernels.usable`."""
    from castbench.models.cross_attention import CrossAttentionLayer  # which reads this package

    torch.manual_seed(0)
    stack: Any = nn.ModuleList(
        CrossAttentionLayer(n_node, 16, 1, width, feedforward, dropout=0.0) for _ in range(layers)
    )
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.2)
    stack.to(device)
    exact = copy.deepcopy(stack).double()
    factors, shifts = torch.randn(2, layers, rows, width, device=device).to(kind)
    h, towards = torch.randn(2, rows, n_node, device=device)

    def reader(*leaves: Tensor) -> Callable[[Tensor], Tensor]:
        """In the place of attention."""
        each = zip(*leaves, strict=True)

        def read(q: Tensor) -> Tensor:
            factor, shift = next(each)
            return q.sin() * factor + shift

        return read

    def results(value: Tensor, own: nn.Module, *leaves: Tensor) -> list[Tensor]:
        parts = [p for name, p in own.named_parameters() if ".key" not in name and ".value" not in name]
        return [value, *torch.autograd.grad((value * towards).sum(), [*leaves, *parts])]

    given = [leaf.requires_grad_() for leaf in (h, factors, shifts)]
    found = fuse(h, stack, reader(factors, shifts), kind)
    doubled = [leaf.detach().double().requires_grad_() for leaf in given]
    wanted, read = doubled[0], reader(*doubled[1:])
    for layer in exact:
        wanted = layer.attend_packed(wanted, read)
    compare(results(found, stack, *given), results(wanted, exact, *doubled), kind)
