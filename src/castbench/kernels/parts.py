"""Float32 numbers as sums of two or three bfloat16, so that matrix units take products of them.

Each part has the next 8 bits: two hold a number but for 2^-16 of it, three all of a float32. Of the
products of two numbers' parts those are taken that are no smaller than what such a sum leaves out. The matrix
units of bfloat16 are twice as fast as those of TF32, take operands that lie either way, and parts that were
made before go from memory into them as they are.

Parts lie behind one another, the largest first. Where PARTS is 1, numbers are of the type of the products as
they are, and a product is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def split(x, kind: tl.constexpr, PARTS: tl.constexpr):
    """The parts of x, of type `kind`: three, of which the first PARTS count."""
    first = x.to(kind)
    second, third = first, first
    if PARTS > 1:
        x -= first.to(tl.float32)
        second = x.to(kind)
    if PARTS > 2:
        third = (x - second.to(tl.float32)).to(kind)
    return first, second, third


@triton.jit
def load_parts(places, real, APART: tl.constexpr, PARTS: tl.constexpr):
    """The parts of what lies at `places` and APART behind; zeros where `real`, if not None, is false."""
    other: tl.constexpr = None if real is None else 0.0
    first = tl.load(places, mask=real, other=other)
    second, third = first, first
    if PARTS > 1:
        second = tl.load(places + APART, mask=real, other=other)
    if PARTS > 2:
        third = tl.load(places + 2 * APART, mask=real, other=other)
    return first, second, third


@triton.jit
def store_parts(places, parts, real, APART: tl.constexpr, PARTS: tl.constexpr):
    """Store parts as `load_parts` finds them, where they are real."""
    for part in tl.static_range(PARTS):
        tl.store(places + part * APART, parts[part], mask=real)


@triton.jit
def trans_parts(parts):
    """The parts of the transposed matrix."""
    return tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2])


@triton.jit
def dot_parts(x, w, total, PARTS: tl.constexpr):
    """total (R, C) + x w, of the parts of x (R, K) and of w (K, C).

    In sums of their own by size, for a product waits for the one before that is added to the same.
    """
    if PARTS == 1:
        total = tl.dot(x[0], w[0], total)
    else:
        rest = tl.dot(x[0], w[1], tl.dot(x[1], w[0]))
        if PARTS == 3:
            rest += tl.dot(x[0], w[2], tl.dot(x[1], w[1], tl.dot(x[2], w[0])))
        total = tl.dot(x[0], w[0], total) + rest
    return total


@triton.jit
def _parts_of(values, parts, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < COLUMNS
    value = tl.load(values + row * COLUMNS + column, mask=real, other=0.0)
    places = parts + PARTS * row * COLUMNS + column
    store_parts(places, split(value, tl.bfloat16, PARTS), real, COLUMNS, PARTS)


def parts_of(values: Tensor, parts: int) -> Tensor:
    """The bfloat16 parts (R, parts C), side by side, of values (R, C) float32."""
    rows, columns = values.shape
    found = values.new_empty(rows, parts * columns, dtype=torch.bfloat16)
    block = min(1024, triton.next_power_of_2(columns))
    _parts_of[(rows, triton.cdiv(columns, block))](values.contiguous(), found, columns, parts, block)
    return found
