"""A step of AdamW on one flat tensor, with the gradient's norm clipped; torch's has a program a matrix.

Loshchilov and Hutter (2019), as torch.optim.AdamW: decoupled decay, moments corrected for their zero start.
The norm is a sum of blocks' sums of squares, in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from castbench.kernels import compare

BLOCK = 2048  # values of a program
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@triton.jit
def _squares(gradient, sums, BLOCK: tl.constexpr):
    """Sum of squares of each block."""
    block = tl.program_id(0)
    g = tl.load(gradient + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + block, tl.sum(g * g, 0))


@triton.jit
def _less_one(x):
    """1 - exp(x) of x <= 0, also where it is small."""
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _step(
    value, gradient, mean, square, count, groups, rates, decays, sums, n_blocks, longest,
    LOG_BETA_1: tl.constexpr, LOG_BETA_2: tl.constexpr, BETA_1: tl.constexpr, BETA_2: tl.constexpr,
    EPS: tl.constexpr, CLIP_EPS: tl.constexpr, CLIPS: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values and moments after the step number `count`; a block is all of one group of parameters."""
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + place)
    if CLIPS:
        every = tl.arange(0, SUMS)
        norm = tl.sqrt(tl.sum(tl.load(sums + every, mask=every < n_blocks, other=0.0), 0))
        g *= tl.minimum(longest / (norm + CLIP_EPS), 1.0, propagate_nan=tl.PropagateNan.ALL)
    group = tl.load(groups + block)
    rate, decay, step = tl.load(rates + group), tl.load(decays + group), tl.load(count)
    m = tl.load(mean + place)
    m += (1 - BETA_1) * (g - m)
    v = tl.load(square + place) * BETA_2 + (1 - BETA_2) * g * g
    tl.store(mean + place, m)
    tl.store(square + place, v)
    size = tl.sqrt(v) / tl.sqrt(_less_one(step * LOG_BETA_2)) + EPS
    x = tl.load(value + place)
    x -= rate * decay * x
    tl.store(value + place, x - rate / _less_one(step * LOG_BETA_1) * (m / size))


def step(
    value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, count: Tensor, groups: Tensor,
    rates: Tensor, decays: Tensor, betas: tuple[float, float], eps: float, longest: float | None,
) -> None:  # fmt: skip
    """Take a step, in place.

    Args:
        value: (n BLOCK,) float32, as are the next three.
        gradient: of the values.
        mean: first moments.
        square: second moments.
        count: () float32, number of this step, from 1.
        groups: (n,) int32, group of parameters that each block belongs to.
        rates: (G,) learning rates of the groups.
        decays: (G,) weight decays.
        betas: shares of the moments that stay.
        eps: what is added to the root of the second moment.
        longest: norm to which the gradient is shortened; None leaves it.
    """
    n = len(groups)
    sums = gradient.new_empty(n)
    if longest is not None:
        _squares[(n,)](gradient, sums, BLOCK)
    _step[(n,)](
        value, gradient, mean, square, count, groups, rates, decays, sums, n,
        0.0 if longest is None else longest,
        LOG_BETA_1=math.log(betas[0]), LOG_BETA_2=math.log(betas[1]), BETA_1=betas[0], BETA_2=betas[1],
        EPS=eps, CLIP_EPS=CLIP_EPS, CLIPS=longest is not None, SUMS=triton.next_power_of_2(n), BLOCK=BLOCK,
    )  # fmt: skip


def check(device: torch.device, kind: torch.dtype) -> None:
    """See that steps are those of torch, in double precision; see `kernels.usable`."""
    torch.manual_seed(0)
    betas, eps, decays = (0.9, 0.999), 1e-8, (0.01, 0.0)
    value, gradients = torch.randn(3 * BLOCK, device=device), torch.randn(3, 3 * BLOCK, device=device)
    mean, square = torch.zeros(2, 3 * BLOCK, device=device)
    groups = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    parts = [nn.Parameter(part.double()) for part in value.split([2 * BLOCK, BLOCK])]
    wanted = torch.optim.AdamW(
        [{"params": [part], "weight_decay": decay} for part, decay in zip(parts, decays, strict=True)],
        lr=0.1, betas=betas, eps=eps,
    )  # fmt: skip
    rates = torch.full((2,), 0.1, device=device)
    for number, gradient in enumerate(gradients, start=1):
        for part, own in zip(parts, gradient.double().split([2 * BLOCK, BLOCK]), strict=True):
            part.grad = own
        longest = 50.0 if number > 1 else None
        if longest is not None:
            nn.utils.clip_grad_norm_(parts, longest)
        wanted.step()
        count = torch.tensor(float(number), device=device)
        step(
            value, gradient, mean, square, count, groups, rates, torch.tensor(decays, device=device),
            betas, eps, longest,
        )  # fmt: skip
    compare([value], [torch.cat([part.detach() for part in parts])], kind)
