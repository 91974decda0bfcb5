"""Checkpoints that survive a kill at any moment: safetensors files with their own hash in their name."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from castbench.provenance import atomic_path

log = logging.getLogger(__name__)

KEPT = 2  # the newest, and the one before it in case the newest is damaged
# One metadata entry: safetensors writes several in an order that changes from run to run.
METADATA = "castbench"


def encode(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Tensors and JSON-able metadata as a safetensors file; equal content gives equal bytes."""
    own = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save(own, {METADATA: json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a file made by `encode`."""
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {})[METADATA])


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write a checkpoint into `folder`, and remove all but the newest `KEPT` ones and what is half-written.

    The file is written under another name, synced and renamed, so a kill leaves the old ones or the new one.

    Raises:
        InputError: the disk is full; the older checkpoints are as they were.
    """
    for left in folder.glob(".*.partial"):  # by a process that was killed
        left.unlink()
    content = encode(tensors, metadata)
    path = folder / f"{step:09d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()
    return path


def read_checkpoint(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and metadata of the newest sound checkpoint; None where there is none.

    A damaged file is removed with a warning, one with another `key` (that is: of other settings, data or
    code) with a log line, so that neither ever counts as one to fall back to.
    """
    for path in _newest_first(folder):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != path.stem.split("-")[1]:
            log.warning("checkpoint %s: damaged, removed; falling back to the one before it", path)
        elif (metadata := read_metadata(path))["key"] != key:
            log.info("checkpoint %s: of other settings, data or code, removed", path)
        else:
            return load(content), metadata
        path.unlink()
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*-*.safetensors"), reverse=True)
