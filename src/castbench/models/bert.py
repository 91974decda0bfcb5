"""A layer of a BERT-like encoder that LoRA adapts, in few passes over memory: for half precision on a GPU.

There the matrix products take less time than the passes of the operations between them would, so that these
are compiled together, states stay in half precision between layers, and LoRA's part of query and value comes
out of the very product that projects the states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castbench.models.attention import has_kernels
from castbench.models.heads import product_type

PROJECTIONS = ("query", "key", "value")


def is_fused(hidden: Tensor) -> bool:
    """Whether layers are run on such states by `run_fused`."""
    return hidden.is_cuda and torch.is_autocast_enabled("cuda")


def run_fused(layers: list[Any], hidden_Td: Tensor, offsets: Tensor, longest: int, padded: bool) -> Tensor:
    """States (T, d) of texts end to end after some layers.

    LoRA's dropout takes the same inputs from query and value, as in loralib's merged projection.

    Args:
        layers: of a Hugging Face encoder; peft's LoRA may be in them.
        hidden_Td: states before them.
        offsets: of the texts (b + 1,).
        longest: tokens that no text exceeds; the same number in every batch, as the code is compiled for it.
        padded: the last text is none, see `Batch`; for a GPU with the kernels alone.
    """
    offsets = offsets.int()
    hidden_Td, attend = hidden_Td.to(product_type(hidden_Td)), flash
    if layers and has_kernels("self_attention", hidden_Td, layers[0].attention.self.attention_head_size):
        from castbench.kernels.self_attention import attend_own

        attend = attend_own
        if not padded:
            offsets = functional.pad(offsets, (0, 1), value=len(hidden_Td))
    with torch.autocast(hidden_Td.device.type, enabled=False):
        for layer in layers:
            for states in (hidden_Td, offsets):  # compiled once for any number of tokens and texts
                torch._dynamo.maybe_mark_dynamic(states, 0)
            hidden_Td = compiled_layer(layer, hidden_Td, offsets, longest, attend)
    return hidden_Td


def fused_layer(
    layer: Any, hidden_Td: Tensor, offsets: Tensor, longest: int, attend: Callable[..., Tensor]
) -> Tensor:
    """States (T, d) after one layer, in the precision of those before; `attend` does what `flash` does."""
    attention = layer.attention.self
    context_Td = attend(project(attention, hidden_Td), offsets, longest, attention.num_attention_heads)
    attended_Td = add_norm(layer.attention.output, context_Td, hidden_Td)
    inner = layer.intermediate
    return add_norm(layer.output, inner.intermediate_act_fn(linear(inner.dense, attended_Td)), attended_Td)


def compiled_layer(*arguments: Any) -> Tensor:
    """What `fused_layer` does, compiled."""
    return _compiled()(*arguments)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Else it cuts layers inside DDP by the size of parameters' storage, which is that of all (FlatAdamW).
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(fused_layer)  # not before it is needed: it imports the compiler, which takes seconds


def flash(qkv_TC: Tensor, offsets: Tensor, longest: int, heads: int) -> Tensor:
    """What tokens with query, key and value side by side attend to in their text (T, d)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv_TC.unflatten(1, (3, heads, -1)).unbind(1)
    context: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    return context.flatten(1)


def project(attention: Any, hidden_Td: Tensor) -> Tensor:
    """Query, key and value of each token, side by side (T, 3 d)."""
    parts, dtype = [getattr(attention, name) for name in PROJECTIONS], hidden_Td.dtype
    frozen = [getattr(part, "base_layer", part) for part in parts]
    weight, bias = (
        torch.cat([getattr(part, name).to(dtype) for part in frozen]) for name in ("weight", "bias")
    )
    adapted = {name: part for name, part in zip(PROJECTIONS, parts, strict=True) if hasattr(part, "lora_A")}
    if not adapted:
        return functional.linear(hidden_Td, weight, bias)
    down = torch.cat([part.lora_A["default"].weight for part in adapted.values()]).to(dtype)
    low_Tr = functional.linear(attention.query.lora_dropout["default"](hidden_Td), down)
    up = torch.block_diag(
        *(
            part.lora_B["default"].weight * part.scaling["default"]
            if name in adapted
            else part.weight.new_zeros(len(part.weight), 0)
            for name, part in zip(PROJECTIONS, parts, strict=True)
        )
    )
    return AdaptedLinear.apply(hidden_Td, low_Tr, weight, bias, up.to(dtype))


class AdaptedLinear(torch.autograd.Function):
    """x W' + u U' + b as one product; W and b are frozen, which saves the gradient of W."""

    @staticmethod
    def forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        """(T, n) from x (T, d), u (T, r), W (n, d), b (n,) and U (n, r)."""
        return functional.linear(torch.cat([x, u], 1), torch.cat([weight, up], 1), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the gradients need."""
        _, u, weight, _, up = inputs
        ctx.save_for_backward(u, weight, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, u and U; that of x where it is needed, which it is not in the first layer."""
        u, weight, up = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, gradient @ up, None, None, gradient.mT @ u
        of_x, of_u = (gradient @ torch.cat([weight, up], 1)).split([weight.shape[1], up.shape[1]], 1)
        return of_x, of_u, None, None, gradient.mT @ u


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of its input."""
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def add_norm(output: Any, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm of the projected x and the residual, inside in single precision."""
    norm = output.LayerNorm
    total = linear(output.dense, x).float() + residual.float()
    return functional.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
