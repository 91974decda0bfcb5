"""Crystal vectors of a padded batch: a program adds up the nodes of a crystal, some rows at a time.

torch's `segment_reduce` adds a crystal's rows one after another, each when the one before has come.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from castbench.models.messages import segment_sums

ROWS = 16  # nodes that a program reads at a time
PADDING = 8  # crystals for each program of the nodes that pad


@triton.jit
def _sum(nodes, shares, offsets, vectors, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    crystal = tl.program_id(0)
    start, end = tl.load(offsets + crystal), tl.load(offsets + crystal + 1)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (column < WIDTH)[None, :]
        share = tl.load(shares + row, mask=row < end, other=0)
        state = tl.load(nodes + row[:, None] * WIDTH + column[None, :], mask=there, other=0).to(tl.float32)
        total += tl.sum(state * share[:, None], 0)
    tl.store(vectors + crystal * WIDTH + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=["n_crystals"])
def _spread(
    of_vectors,
    shares,
    offsets,
    of_nodes,
    n_crystals,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    crystal = tl.minimum(tl.program_id(0), n_crystals)
    piece, pieces = tl.program_id(0) - crystal, 1
    if crystal == n_crystals:  # the nodes that pad, shared among the programs from here on
        pieces = tl.num_programs(0) - n_crystals
    start, end = tl.load(offsets + crystal), tl.load(offsets + crystal + 1)
    column = tl.arange(0, COLUMNS)
    known = (column < WIDTH) & (crystal < n_crystals)
    of_vector = tl.load(of_vectors + crystal * WIDTH + column, mask=known, other=0)
    for first in range(start + piece * ROWS, end, pieces * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (column < WIDTH)[None, :]
        share = tl.load(shares + row, mask=row < end, other=0)
        value = (of_vector[None, :] * share[:, None]).to(of_nodes.dtype.element_ty)
        tl.store(of_nodes + row[:, None] * WIDTH + column[None, :], value, mask=there)


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nodes: Tensor, shares: Tensor, offsets: Tensor) -> Tensor:
        nodes, n, width = nodes.contiguous(), len(offsets) - 2, nodes.shape[1]
        ctx.save_for_backward(shares, offsets)
        ctx.shape, ctx.dtype = nodes.shape, nodes.dtype
        vectors = shares.new_empty(n, width)
        _sum[(n,)](nodes, shares, offsets, vectors, width, triton.next_power_of_2(width), ROWS)
        return vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (of_vectors,) = gradients
        shares, offsets = ctx.saved_tensors
        n, width = len(offsets) - 2, ctx.shape[1]
        of_nodes = torch.empty(ctx.shape, dtype=ctx.dtype, device=shares.device)
        columns, programs = triton.next_power_of_2(width), n + triton.cdiv(n, PADDING)
        of_vectors = of_vectors.contiguous()
        _spread[(programs,)](of_vectors, shares, offsets, of_nodes, n, width, columns, ROWS)
        return of_nodes, None, None


def readout(nodes: Tensor, shares: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums (B, d) float32 of the nodes of each crystal, without the one that pads.

    Args:
        nodes: (N, d) float32 or bfloat16.
        shares: (N,) float32 weights; constant.
        offsets: (B + 2,) int64 of the crystals and the one behind.
    """
    return _Readout.apply(nodes, shares, offsets)


@torch.enable_grad()
def check(device: torch.device, kind: torch.dtype) -> None:
    """Compare with torch, forward and backward.

    Raises:
        AssertionError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 40, 57, 58, 200])
    shares = torch.rand(200, generator=generator)
    shares[58:] = 0
    offsets, shares = offsets.to(device), shares.to(device)
    of_vectors = torch.randn(5, 100, generator=generator).to(device)
    for kind, accuracy in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        nodes = torch.randn(200, 100, generator=generator).to(device, kind).requires_grad_()
        found, wanted = readout(nodes, shares, offsets), segment_sums(nodes * shares[:, None], offsets[:-1])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        of_nodes, of_wanted = (torch.autograd.grad(x, nodes, of_vectors)[0] for x in (found, wanted))
        torch.testing.assert_close(of_nodes, of_wanted, rtol=accuracy, atol=1e-6)
