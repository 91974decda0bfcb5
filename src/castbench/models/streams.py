"""Work for a GPU that runs beside other work, on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

_ordered: ContextVar[bool] = ContextVar("_ordered", default=False)


@contextmanager
def in_order() -> Iterator[None]:
    """Run nothing `beside` in this block: several runs in one process would share the stream for it."""
    token = _ordered.set(True)
    try:
        yield
    finally:
        _ordered.reset(token)


@contextmanager
def beside(read: Tensor) -> Iterator[Callable[[], None]]:
    """Run what is in the block beside what follows it, until the function is called that the block is given.

    So does autograd with the backward pass. Of tensors from before, the block may use `read`, and others that
    outlive that pass, as parameters do. What it makes needs no care: such memory is used again in a block
    like this or its backward pass alone, and these wait for all that read it. On a CPU all runs in order.
    """
    if not read.is_cuda or _ordered.get():
        yield lambda: None
        return
    current, other = torch.cuda.current_stream(read.device), _stream(read.device)
    other.wait_stream(current)
    read.record_stream(other)
    with torch.cuda.stream(other):
        yield lambda: current.wait_stream(other)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
