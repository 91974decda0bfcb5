"""Checkpoints that survive a kill at any moment: safetensors files with their own hash in their name."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from castbench.provenance import alone_in, atomic_path

log = logging.getLogger(__name__)

KEPT = 2  # the newest, and the one before it in case the newest is damaged
# One metadata entry: safetensors writes several in an order that changes from run to run.
METADATA = "castbench"
KEY_LENGTH = 16  # of the key, in a file's name


def encode(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Tensors and JSON-able metadata as a safetensors file; equal content gives equal bytes."""
    own = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save(own, {METADATA: json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a file made by `encode`."""
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {})[METADATA])


def write_checkpoint(
    folder: Path,
    key: str,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    last: bool = False,
) -> None:
    """Write a checkpoint into `folder`, and remove all but the newest `KEPT` ones and what is half-written.

    The file is written under another name, synced and renamed, so a kill leaves the old ones or the new one.
    Those of another `key` (that is: of other settings, data or code) are left to who goes back to these,
    until the `last` one of a run is written.

    Raises:
        InputError: the disk is full; the older checkpoints are as they were.
    """
    content = encode(tensors, metadata)
    path = folder / f"{key[:KEY_LENGTH]}-{step:09d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    with alone_in(folder):
        with atomic_path(path) as partial:
            partial.write_bytes(content)
        own = newest_first(folder, key)
        others = set(folder.glob("*.safetensors")) - set(own) if last else ()
        for old in (*own[KEPT:], *others):
            old.unlink(missing_ok=True)


def read_checkpoint(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and metadata of the newest sound checkpoint of `key`; None where there is none.

    A damaged file is removed with a warning, so that it never counts as one to fall back to.
    """
    for path in newest_first(folder, key):
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem.split("-")[-1]:
                return load(content), read_metadata(path)
        except OSError as error:  # also where another process that trains this run has just removed it
            log.warning("checkpoint %s: cannot be read (%s); falling back to the one before it", path, error)
            continue
        log.warning("checkpoint %s: damaged, removed; falling back to the one before it", path)
        path.unlink(missing_ok=True)
    if others := len([*folder.glob("*.safetensors")]):
        log.warning("%s: %d checkpoints are of other settings, data or code; starting anew", folder, others)
    return None


def newest_first(folder: Path, key: str) -> list[Path]:
    """The checkpoints of a run."""
    return sorted(folder.glob(f"{key[:KEY_LENGTH]}-*.safetensors"), reverse=True)
