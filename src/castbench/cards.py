"""Which GPU a job takes: where it sees several, one that no other job on the machine holds.

Snakemake counts cards (the resource `gpu`) but does not say which: all jobs would take the first. A cluster's
scheduler shows a job its own card alone, and then there is nothing to choose.
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


def take_card(device: str) -> None:
    """Make one free card the only visible one until the process ends; call it before CUDA is used.

    Waits while other jobs hold all cards.

    Args:
        device: cpu (nothing happens), cuda or auto.
    """
    cards = visible_cards() if device != "cpu" else []
    if len(cards) < 2:
        return
    waiting = False
    while (card := next((card for card in cards if lock(card)), None)) is None:
        if not waiting:
            log.warning("all %d cards are held by other jobs; waiting for one", len(cards))
        waiting = True
        time.sleep(POLL)
    log.info("card %s of %s", card, ", ".join(cards))
    os.environ[VISIBLE] = card


def visible_cards() -> list[str]:
    """Indices or UUIDs of the cards that CUDA would show."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [card.strip() for card in named.split(",") if card.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, wakes no card


def lock(card: str) -> bool:
    """Hold the lock file of a card if no process does."""
    file = Path(tempfile.gettempdir()) / f"castbench-card-{card}.lock"
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # another user's file in a folder of all: it may be opened, not created
        handle = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    _held.append(handle)
    return True
