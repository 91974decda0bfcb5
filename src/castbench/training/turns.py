"""Several runs in one process, a step of each in turn, so that small models fill a GPU together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from castbench.models.streams import in_order


def take_turns(runs: Sequence[Iterator[None]], side_by_side: int, device: torch.device) -> None:
    """Take a step of each run in turn until all have ended; `side_by_side` of them are under way at a time.

    On a GPU each run has a stream of its own, from torch 2.13 on: before, all recorded steps read the seed of
    their dropout from one place. While one step waits or is too small for the device, another's operations
    run. A run must draw no random number from a stream that another run draws from between steps.

    Raises:
        SystemExit: that of a run that was asked to stop, once every run under way has come to its own.
    """
    waiting, stopped = deque(runs), None
    apart = device.type == "cuda" and torch.__version__ >= "2.13"
    under_way: deque[tuple[Iterator[None], torch.cuda.Stream | None]] = deque()
    while waiting or under_way:
        while waiting and len(under_way) < side_by_side:
            under_way.append((waiting.popleft(), torch.cuda.Stream() if apart else None))
        run, stream = under_way.popleft()
        try:
            # torch.cuda.stream does nothing without one.
            with torch.cuda.stream(stream), in_order() if side_by_side > 1 else nullcontext():
                next(run)
        except StopIteration:
            continue
        except SystemExit as error:
            stopped = error
            waiting.clear()
            continue
        under_way.append((run, stream))
    if stopped is not None:
        raise stopped
