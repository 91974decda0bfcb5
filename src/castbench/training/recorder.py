"""Training steps as CUDA graphs: recorded once for each shape of a batch, then replayed with one call.

A step of a small model is hundreds of operations of a few microseconds each, and the host takes longer to ask
for them than the GPU to do them. A replay asks once. It runs what was recorded, so that a step's bits depend
on the shapes and values of its inputs alone, whether the run was interrupted or not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Functions of tensors on a GPU, as graphs.

    Args:
        device: the GPU.
        state: all tensors that the functions change; recording one leaves them as they are.
    """

    def __init__(self, device: torch.device, state: Callable[[], Iterable[Tensor]]):
        self.device, self.state = device, state
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self.pool: Any = None  # of memory, which all graphs share: they run one after another
        self.stream = recording_stream(device)

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The function's value, recorded where `key` is new."""
        self.record(key, function, *inputs)
        return self.replay(key, *inputs)

    def record(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Record `function` of inputs with these shapes under `key`, if that is new.

        It must not wait for the device, nor depend on anything else that changes but tensors of fixed places.
        """
        if key in self.graphs:
            return
        if not self.graphs:
            gc.collect()  # graphs of runs that have ended: they hold memory
        places = tuple(value.to(self.device, copy=True) for value in inputs)
        kept = [(value, value.clone()) for value in self.state()]
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        # What is made ready at a first call is not to be recorded. On the same stream, of which the products
        # keep memory for each.
        with torch.cuda.stream(self.stream):
            for _ in range(1 if self.graphs else 3):
                function(*places)
            with torch.no_grad():
                for value, before in kept:
                    value.copy_(before)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            found = function(*places)
        self.pool = graph.pool()
        self.graphs[key] = graph, places, found

    def replay(self, key: Hashable, *inputs: Tensor) -> Tensor:
        """The function's value, which the next replay overwrites."""
        graph, places, found = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return found


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs of the process: products keep memory for each stream that they were on.

    What runs beside its work (models/streams.py) gives way to it.
    """
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected in this block: freeing a graph breaks another that is being recorded."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
