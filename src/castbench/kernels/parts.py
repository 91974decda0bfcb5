"""Float32 numbers as sums of three bfloat16, so that matrix units take products of them.

Three times 8 bits are the 24 of a float32, so that nothing is lost. Of the nine products of two such sums
the six largest are taken, the smallest first; what is left out is 2^-24 of the product at most. The matrix
units of bfloat16 are twice as fast as those of TF32, take operands that lie either way, and parts that were
made before go from memory into them as they are.

Where PARTS is 1, numbers are of the type of the products as they are, and a product is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def split(x, kind: tl.constexpr, PARTS: tl.constexpr):
    """The parts of x, all of type `kind`."""
    first = x.to(kind)
    if PARTS == 1:
        parts = (first,)
    else:
        x -= first.to(tl.float32)
        second = x.to(kind)
        parts = (first, second, (x - second.to(tl.float32)).to(kind))
    return parts


@triton.jit
def load_parts(places, APART: tl.constexpr, PARTS: tl.constexpr):
    """The parts of what lies at `places`, APART behind one another."""
    if PARTS == 1:
        parts = (tl.load(places),)
    else:
        parts = (tl.load(places), tl.load(places + APART), tl.load(places + 2 * APART))
    return parts


@triton.jit
def load_some_parts(places, real, APART: tl.constexpr, PARTS: tl.constexpr):
    """The same of what is real, and zeros."""
    if PARTS == 1:
        parts = (tl.load(places, mask=real, other=0.0),)
    else:
        parts = (
            tl.load(places, mask=real, other=0.0),
            tl.load(places + APART, mask=real, other=0.0),
            tl.load(places + 2 * APART, mask=real, other=0.0),
        )
    return parts


@triton.jit
def store_parts(places, parts, real, APART: tl.constexpr, PARTS: tl.constexpr):
    """Store parts at `places`, APART behind one another, where they are real."""
    for part in tl.static_range(PARTS):
        tl.store(places + part * APART, parts[part], mask=real)


@triton.jit
def trans_parts(parts, PARTS: tl.constexpr):
    """The parts of what is transposed."""
    if PARTS == 1:
        turned = (tl.trans(parts[0]),)
    else:
        turned = (tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2]))
    return turned


@triton.jit
def dot_parts(x, w, total, PARTS: tl.constexpr):
    """total (R, C) + x w, of the parts of x (R, K) and of w (K, C)."""
    if PARTS == 1:
        total = tl.dot(x[0], w[0], total)
    else:
        # Three sums, for a product waits for the one before that is added to the same.
        small, middle = tl.dot(x[2], w[0]), tl.dot(x[1], w[0])
        small, middle = tl.dot(x[1], w[1], small), tl.dot(x[0], w[1], middle)
        small = tl.dot(x[0], w[2], small)
        total = tl.dot(x[0], w[0], total) + (middle + small)
    return total


@triton.jit
def _thirds(values, parts, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Values (R, COLUMNS) to [first | second | third] (R, 3 COLUMNS); a program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < COLUMNS
    value = tl.load(values + row * COLUMNS + column, mask=real, other=0.0)
    store_parts(parts + 3 * row * COLUMNS + column, split(value, tl.bfloat16, 3), real, COLUMNS, 3)


def thirds(values: Tensor) -> Tensor:
    """Values (R, C) float32 as bfloat16 [first | second | third] (R, 3 C), whose sum they are."""
    rows, columns = values.shape
    parts = values.new_empty(rows, 3 * columns, dtype=torch.bfloat16)
    block = min(1024, triton.next_power_of_2(columns))
    _thirds[(rows, triton.cdiv(columns, block))](values.contiguous(), parts, columns, block)
    return parts
