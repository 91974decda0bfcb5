"""Learning rate, data order and random numbers of a run, as functions of (seed, step).

Nothing here has a state, so a resumed run needs to restore none of it.
"""

import hashlib
import math

import torch
from torch import Tensor


def warmup_length(total: int, warmup_steps: int) -> int:
    """Warm-up steps of a run of `total` steps: those asked for, at most a tenth of the run."""
    return min(warmup_steps, total // 10)


def rate_factor(
    step: int, total: int, warmup_steps: int, cycles: int, schedule: str = "cosine", final: float = 0.0
) -> float:
    """Share in (0, 1] of the peak learning rate at `step` = 0 ... total - 1.

    Linear warm-up, then `cycles` equal periods of a cosine from 1 towards 0 ("periodic cosine", CAST 4.3);
    with the schedule "linear" a straight line from 1 towards `final` (coGN on Matbench).
    """
    warmup = warmup_length(total, warmup_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    if schedule == "linear":
        return 1 - (1 - final) * done
    place = done * cycles % 1.0
    return 0.5 * (1 + math.cos(math.pi * place))


def stateless_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of `parts` alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of `parts` alone."""
    return torch.Generator().manual_seed(stateless_seed(*parts))


def seed_step(device: torch.device, *parts: int | str) -> None:
    """Seed the streams that dropout draws from; torch.manual_seed would also wake devices not in use."""
    seed = stateless_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def batches(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Cut `rows` into as few batches of at most `batch_size` as it takes, of even size; none is dropped."""
    return rows.tensor_split(math.ceil(len(rows) / batch_size))


def epoch_batches(rows: Tensor, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The batches of an epoch, in an order that is a function of (seed, epoch)."""
    order = torch.randperm(len(rows), generator=generator(seed, "order", epoch))
    return batches(rows[order], batch_size)
