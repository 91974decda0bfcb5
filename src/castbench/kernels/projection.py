"""Linear layers of one input, in one product, for token states: they are many, and bfloat16 in the cache.

In float32 such a product takes fifteen times as long as in bfloat16. But two bfloat16 parts of the weights
(see `parts`) are these but for 2^-18 or so, and their products with the states, taken as one, are exact but
for their float32 sums, of which matrix units cut the last bit off at each addition. That costs about as much,
so that a third part would not show. The gradient of the weights likewise, from two parts of the output's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from castbench.kernels import compare
from castbench.kernels.parts import parts_of

PARTS = 2
ALIGNED = 8  # columns: a row of so many bfloat16 numbers is 16 bytes


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, float32, of bfloat16 factors."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Half(torch.autograd.Function):
    """Outputs (T, C) bfloat16 of x (T, E) bfloat16; parameters are the layers' weights, then their biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes, weight, bias = _together(parameters)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        d_x = gradient @ weight if ctx.needs_input_grad[0] else None
        d_weight = product(gradient.T, x)
        d_bias = product(gradient.new_ones(ALIGNED, len(x)), gradient)[0]  # sooner than a sum
        return d_x, *d_weight.split(ctx.sizes), *d_bias.split(ctx.sizes)


class _Exact(torch.autograd.Function):
    """The same in float32, still of x in bfloat16, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes, weight, bias = _together(parameters)
        ctx.width = x.shape[1]
        # The bias as one more column of the weight, which meets ones.
        ones, zeros = x.new_ones(len(x), ALIGNED), bias.new_zeros(len(bias), ALIGNED - 1)
        parts = parts_of(torch.cat([weight, bias.unsqueeze(1), zeros], dim=1), PARTS)
        # The smallest parts first, so that less is cut off when the others are added.
        parts = parts.unflatten(1, (PARTS, -1)).flip(1).flatten(1)
        x = torch.cat([x, ones] * PARTS, dim=1)
        ctx.save_for_backward(x)
        return product(x, parts.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        found = product(parts_of(gradient, PARTS).T, x[:, : ctx.width + ALIGNED])
        d_weight, d_bias, _ = found.unflatten(0, (PARTS, -1)).sum(0).split([ctx.width, 1, ALIGNED - 1], 1)
        return None, *d_weight.split(ctx.sizes), *d_bias.squeeze(1).split(ctx.sizes)


def _together(parameters: tuple[Tensor, ...]) -> tuple[list[int], Tensor, Tensor]:
    """Outputs of each layer, and the weight (C, E) and bias (C,) of all."""
    sizes = [len(bias) for bias in parameters[len(parameters) // 2 :]]
    flat = torch.cat([value.flatten() for value in parameters])
    return sizes, flat[: -sum(sizes)].view(sum(sizes), -1), flat[-sum(sizes) :]


def fits(x: Tensor, kind: torch.dtype) -> bool:
    """Whether products of rows x (T, E) in this type are taken here: float32 ones of constant bfloat16."""
    constant = x.dtype == torch.bfloat16 and not x.requires_grad
    return x.dim() == 2 and (kind == torch.bfloat16 or (kind == torch.float32 and constant))


def project(x: Tensor, layers: Sequence[nn.Linear], kind: torch.dtype) -> Tensor:
    """The layers' outputs (T, C), side by side and of type `kind`, of x (T, E) that fits."""
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    return _Exact.apply(x, *parameters) if kind == torch.float32 else _Half.apply(x.to(kind), *parameters)


def check(
    device: torch.device,
    kind: torch.dtype,
    rows: int = 700,
    columns: int = 768,
    widths: Sequence[int] = (128, 64),
) -> None:
    """See that layers find what they do in plain torch and double precision; see `kernels.usable`."""
    torch.manual_seed(0)
    layers: Any = nn.ModuleList(nn.Linear(columns, width) for width in widths).to(device)
    exact = copy.deepcopy(layers).double()
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16, requires_grad=kind != torch.float32)
    towards = torch.randn(rows, sum(widths), device=device)

    def results(value: Tensor, own: nn.Module) -> list[Tensor]:
        leaves = [*([x] if x.requires_grad else []), *own.parameters()]
        return [value, *torch.autograd.grad((value * towards).sum(), leaves)]

    wanted = torch.cat([layer(x.double()) for layer in exact], dim=1)
    compare(results(project(x, layers, kind), layers), results(wanted, exact), kind)
