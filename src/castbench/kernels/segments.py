"""What the kernels of attention share: packed rows of segments (crystals, texts), and their check.

As in FlashAttention-2 (Dao 2023), scores stay in registers, and a softmax is summed up over blocks of keys. A
program has one head of a block of rows: of queries, whose outputs or gradients it sums over the segment's
keys, or of keys, whose gradients it sums over its queries. So the gradient makes scores twice, but each row
is written by one program, and nothing is added to what another wrote: the bits are always the same.

Packed rows (rows, columns) have the heads side by side in their columns, and may be slices of wider ones.
Offsets (B + 2,) are those of B segments and, behind them, of rows that pad, which may be none: these attend
to nothing, and their outputs and gradients are 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from castbench.kernels import compare

LOG2E = 1.4426950408889634


@triton.jit
def own_rows(offsets):
    """First row of the program's segment, and how many it has."""
    segment = tl.num_programs(2) - 1 - tl.program_id(2)  # long texts, which come last, first
    start = tl.load(offsets + segment).to(tl.int64)
    return start, (tl.load(offsets + segment + 1).to(tl.int64) - start).to(tl.int32)


@triton.jit
def load_rows(x, row, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
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
def store_rows(x, tile, row, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Store rows of a head, but for those from n on."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = row[:, None] < n
    if WIDTH != COLUMNS:
        mask = mask & (column < WIDTH)
    tl.store(x + row[:, None] * stride + column, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def clear_rows(x, n, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in this program's part of a segment's n rows."""
    for start in range(tl.program_id(1) * ROWS, n, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        store_rows(x, tl.full([ROWS, COLUMNS], 0.0, tl.float32), row, n, stride, WIDTH, COLUMNS)


def scales(q: Tensor, heads: int) -> tuple[float, float]:
    """What a product of query and key is multiplied with, as an exponent of 2, and of e."""
    factor = (q.shape[1] // heads) ** -0.5
    return factor * LOG2E, factor


def columns_of(width: int) -> int:
    """Columns of a tile that holds a head's."""
    return max(triton.next_power_of_2(width), 16)


def drawn(*shapes: tuple[int, ...], device: torch.device, kind: torch.dtype) -> list[Tensor]:
    """Normally distributed numbers, always the same, that want gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, kind).requires_grad_() for shape in shapes]


def see_exact(
    found: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    heads: int,
    *inputs: Tensor,
) -> None:
    """See that outputs, and the gradients of their inputs, are those of float64.

    Args:
        found: outputs (Q, D).
        parts: queries, keys and values, made of the inputs.
        offsets: of queries and of keys.
        heads: that share D.
        inputs: of both.

    Raises:
        RuntimeError: they are not.
    """
    exact = explicit(*parts, offsets, heads)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(exact.device)
    ours, wanted = ([y, *torch.autograd.grad((y.double() * weights).sum(), inputs)] for y in (found, exact))
    compare(ours, wanted, inputs[0].dtype)


def explicit(q: Tensor, k: Tensor, v: Tensor, offsets: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Outputs (Q, D) in float64, one segment after the other."""
    q_lengths, k_lengths = (each.diff().tolist() for each in offsets)
    q, k, v = (part.double().unflatten(1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
    parts = zip(q.split(q_lengths, 1), k.split(k_lengths, 1), v.split(k_lengths, 1), strict=True)
    found = [(a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c for a, b, c in parts]
    found[-1] = found[-1] * 0
    return torch.cat(found, 1).transpose(0, 1).flatten(1)
