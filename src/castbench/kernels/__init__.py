"""Triton kernels for the GPU: each file has the few passes that a chain of torch operations is made into.

They give the same bits every time: no two programs add to one place. Where they cannot be used, the
operations that they stand for are run one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


PRECISION = "tf32x3"  # of products of float32: three of the matrix units stand for an exact one
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # relative, of a tensor


@cache
def usable(name: str, device: torch.device, kind: torch.dtype = torch.float32) -> bool:
    """Whether the kernels of file `name`, with products in type `kind`, find on a device what torch does."""
    if device.type != "cuda":
        return False
    try:
        with (
            torch.random.fork_rng([device]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            import_module(f"castbench.kernels.{name}").check(device, kind)
    except Exception as error:  # of whatever kind: without them all goes on
        log.warning("%s runs without its kernels, slower: %s: %s", name, type(error).__name__, error)
        return False
    return True


def compare(found: Iterable[Tensor], wanted: Iterable[Tensor], kind: torch.dtype) -> None:
    """See that tensors agree as far as products in type `kind` can.

    Raises:
        RuntimeError: they do not.
    """
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        one, other = one.detach().double(), other.detach().double()
        error = float((one - other).norm() / other.norm())
        if not error < LARGEST_ERROR[kind]:
            raise RuntimeError(f"result {place} is off by {error:.1g} of its size")


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a multiprocessor of a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin
