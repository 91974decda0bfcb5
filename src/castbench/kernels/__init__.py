"""Triton kernels in place of chains of torch operations; nothing imports them where they are not usable."""

from __future__ import annotations

import importlib
import logging
from functools import cache

import torch

log = logging.getLogger(__name__)


@cache
def usable(name: str, device: torch.device) -> bool:
    """Whether the kernels of `castbench.kernels.<name>` run on the device and agree with torch there."""
    if device.type != "cuda":
        return False
    try:
        importlib.import_module(f"castbench.kernels.{name}").check(device)
    except Exception as error:  # no triton, no compiler, another GPU: torch's operations do the same
        log.warning("kernels %s: not used on %s (%s)", name, device, error)
        return False
    return True
