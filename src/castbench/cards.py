"""Which GPUs a job takes: where it sees several, those that no other job on the machine holds.

Snakemake counts cards (the resource `gpu`) but does not say which: all jobs would take the first. A cluster's
scheduler shows a job its own card alone, and then there is nothing to choose.
"""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from castbench.errors import InputError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
CHOSEN = "CASTBENCH_CARDS"  # what a process has taken, for those that it starts
POLL = 2.0  # seconds between two looks at cards that are all taken
_held: list[int] = []  # open lock files: the kernel unlocks them when the process ends, however it does


def take_cards(device: str, n: int = 1) -> None:
    """Make `n` free cards the only visible ones until the process ends; call it before CUDA is used.

    Waits while other jobs hold too many. Processes that this one starts share its cards.

    Args:
        device: cpu (nothing happens), cuda or auto.
        n: of cards.
    """
    cards = visible_cards() if device != "cpu" else []
    if len(cards) < 2 or os.environ.get(CHOSEN) == ",".join(cards) or chosen_already(cards, n):
        return
    waiting = False
    while len(taken := take(cards, n)) < min(n, len(cards)):
        if not waiting:
            log.warning("of %d cards, other jobs hold all or all but %d; waiting", len(cards), n - 1)
        waiting = True
        time.sleep(POLL)
    log.info("card %s of %s", ", ".join(taken), ", ".join(cards))
    os.environ[VISIBLE] = os.environ[CHOSEN] = ",".join(taken)


def chosen_already(cards: list[str], n: int) -> bool:
    """Whether there is nothing to choose: Slurm shows no more than was asked for, or torchrun shares all.

    Their processes on a node see the same cards, and none started another: they would wait for each other.
    And Slurm may number the cards of every job from 0.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ or ("SLURM_JOB_ID" in os.environ and len(cards) <= n)


def take(cards: list[str], n: int) -> list[str]:
    """Hold the first `n` free cards, or none where there are fewer."""
    held: dict[str, int] = {}
    for card in cards:
        if len(held) < n and (handle := lock(card)) is not None:
            held[card] = handle
    if len(held) < min(n, len(cards)):
        for handle in held.values():
            os.close(handle)
        return []
    _held.extend(held.values())
    return list(held)


def choose_device(name: str, count: int = 1, started: bool = False) -> "torch.device":
    """The device of a name (cpu, cuda or auto: a GPU where there is one), on cards taken by `take_cards`.

    Processes that a scheduler has `started` on a node see the same cards, and none takes any from the others.

    Raises:
        InputError: a GPU is asked for, or several, and there are not so many.
    """
    import torch

    if not started:
        take_cards(name, count)
    found = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cuda" and not found:
        raise InputError(
            "training.device: cuda, but torch finds no GPU (no driver, or a build of torch for the CPU);"
            " use cpu or auto"
        )
    if found and found < count:
        raise InputError(f"training.devices: {count}, but torch finds {found} GPUs")
    return torch.device("cuda" if found else "cpu")


def visible_cards() -> list[str]:
    """Indices or UUIDs of the cards that CUDA would show."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [card.strip() for card in named.split(",") if card.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, wakes no card


def lock(card: str) -> int | None:
    """Open handle of a card's lock file, held until it is closed; None where another process holds it."""
    file = Path(tempfile.gettempdir()) / f"castbench-card-{card}.lock"
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # another user's file in a folder of all: it may be opened, not created
        handle = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
