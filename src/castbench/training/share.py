"""Which part of every batch a process computes, where several train one model together.

Every process goes through the same batches, and takes its part of each. Losses are weighted such that the
mean of the processes' gradients, which DDP forms, is the gradient of the whole batch's loss. Validation is
shared by whole batches, so that its bits do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, futures

from castbench.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """The place of this process among those that train together; by default it is alone.

    Attributes:
        rank: 0, ..., processes - 1.
        processes: number of them.
    """

    rank: int = 0
    processes: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """This process's part of the rows (B,) of a batch."""
        return rows[slice(*self.span(len(rows)))]

    def span(self, n: int) -> tuple[int, int]:
        """First place, and the one behind the last, of this process's part of a batch of `n`.

        Raises:
            InputError: there are fewer than processes.
        """
        if n < self.processes:
            raise InputError(
                f"training.devices: a batch of {n} cannot be shared by {self.processes} processes; "
                "use fewer devices or larger batches"
            )
        size, more = divmod(n, self.processes)
        first = self.rank * size + min(self.rank, more)
        return first, first + size + (self.rank < more)

    def weight(self, own: int, whole: int) -> float:
        """Factor of the mean over `own` values; the mean of all processes is then that over the `whole`."""
        return self.processes * own / whole

    def every(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items of a list that all have: every so many-th."""
        return items[self.rank :: self.processes]

    def summed(self, values: Tensor) -> Tensor:
        """Sum over the processes, of values that are 0 but where this process computed them."""
        if self.processes > 1:
            distributed.all_reduce(values)
        return values


def added_in_order(bucket: Any) -> futures.Future[Tensor]:
    """The mean of the processes' gradients in a bucket of DDP, added up in the order of the processes.

    Gloo's own order depends on the place in the bucket, and the places on whether the session had a step
    before: a resumed run's first step would have other bits.
    """
    own = bucket.buffer()
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, own)
    total = every[0]
    for values in every[1:]:
        total += values
    found: futures.Future[Tensor] = futures.Future()
    found.set_result(total.div_(len(every)))
    return found
