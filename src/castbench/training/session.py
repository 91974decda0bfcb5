"""The process that runs belong to: device, precision, determinism, and what a run is a function of."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from castbench.cards import take_cards
from castbench.provenance import hardware, sha256_json

log = logging.getLogger(__name__)

CODE = ("models", "training", "text/encoders.py")  # what the weights of a run come from, under castbench/


def open_session(training: dict[str, Any], threads: int) -> Fabric:
    """Set torch up for reproducible runs, and return the Fabric of the configured device and precision.

    The order in which the CPU adds up depends on the number of threads, so the config decides it, not the
    number of cores that the scheduler happened to have (`threads`).
    """
    wanted = training["threads"]
    if threads < wanted:
        log.warning("training.threads: %d, but the job has %d cores; it will be slow", wanted, threads)
    take_cards(training["device"])
    torch.set_num_threads(wanted)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with it, and writes every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Fabric(accelerator=training["device"], devices=1, precision=training["precision"])


def run_key(fabric: Fabric, **parts: Any) -> str:
    """Hash of `parts` (settings, seed, checksums of data), the code of models and training, torch, device."""
    package = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for name in CODE:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(file.read_bytes())
    platform = {"torch": torch.__version__, "device": fabric.device.type, "code": code.hexdigest()}
    return sha256_json({**platform, **parts})


def cost(fabric: Fabric, seconds: float, samples: int) -> dict[str, Any]:
    """The content of cost.json: wall time of training and validation, crystals trained on per second of it.

    Peak memory (MiB) is the GPU's where one is used, else the process's so far, caches mapped in included.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if fabric.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(fabric.device) / 2**20
    return {
        "seconds": round(seconds, 3),
        "samples_per_second": round(samples / seconds, 3) if seconds else None,
        "peak_memory_mb": round(peak, 1),
        "hardware": hardware() | {"threads": torch.get_num_threads(), "device": str(fabric.device)},
    }
