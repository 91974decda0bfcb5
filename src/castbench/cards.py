"""Which GPUs a job takes: where it sees more than it needs, those that no other job on the machine holds.

Snakemake counts cards (the resource `gpu`) but does not say which: all jobs would take the first. A cluster's
scheduler shows a job its own cards alone, and then there is nothing to choose.
"""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 2.0  # seconds between two looks at cards that are all taken
_held: list[int] = []  # open lock files: the kernel unlocks them when the process ends, however it does


def take_cards(device: str, count: int = 1) -> None:
    """Make free cards the only visible ones until the process ends; call it before CUDA is used.

    Waits while other jobs hold too many. Holds none meanwhile, so that two jobs never wait for one another;
    the processes that this one starts see its cards and choose no more.

    Args:
        device: cpu (nothing happens), cuda or auto.
        count: cards that the job needs.
    """
    cards = visible_cards() if device != "cpu" else []
    if len(cards) <= count:
        return
    waiting = False
    while len(taken := lock_cards(cards, count)) < count:
        if not waiting:
            log.warning("%d of %d cards are needed and other jobs hold the rest; waiting", count, len(cards))
        waiting = True
        time.sleep(POLL)
    log.info("card %s of %s", ", ".join(taken), ", ".join(cards))
    os.environ[VISIBLE] = ",".join(taken)


def lock_cards(cards: list[str], count: int) -> list[str]:
    """`count` of the cards, locked, or none where fewer are free."""
    found: dict[str, int] = {}
    for card in cards:
        if len(found) < count and (handle := lock(card)) is not None:
            found[card] = handle
    if len(found) < count:
        for handle in found.values():
            os.close(handle)
        return []
    _held.extend(found.values())
    return list(found)


def visible_cards() -> list[str]:
    """Indices or UUIDs of the cards that CUDA would show."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [card.strip() for card in named.split(",") if card.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, wakes no card


def lock(card: str) -> int | None:
    """The open and locked file of a card; None where another process holds it."""
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
