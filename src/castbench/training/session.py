"""The process that runs belong to: device, precision, determinism, and what a run is a function of."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from castbench.cards import choose_device
from castbench.errors import InputError
from castbench.provenance import hardware, package_versions, peak_rss, sha256_json
from castbench.training.share import added_in_order

log = logging.getLogger(__name__)

# What weights and predictions of a run come from: here under castbench/, and packages.
CODE = (
    "kernels", "models", "training", "compositions/descriptors.py", "compositions/formulas.py",
    "compositions/targets.py", "evaluation/metrics.py", "graphs/packed.py", "graphs/crystal_graph.py",
    "labels.py", "materials/splits.py", "materials/targets.py", "packed.py", "text/encoders.py",
    "text/states.py", "text/tokens.py",
)  # fmt: skip
PACKAGES = (
    "torch",
    "lightning-fabric",
    "transformers",
    "peft",
    "pymatgen",
    "pymatgen-core",
    "ElementEmbeddings",
)

FIRST = "CASTBENCH_FIRST"  # the process that started those that train with it, for these
ONE_DEVICE = {"devices": 1, "num_nodes": 1}  # settings of what does not train


def open_session(training: dict[str, Any], threads: int) -> Fabric:
    """Set torch up for reproducible runs, and return the Fabric of the configured devices and precision.

    With several devices this process starts itself once more for each of the others; over several nodes the
    scheduler does (srun, torchrun). What follows is run by all of them.

    The order in which the CPU adds up depends on the number of threads, so the config decides it, not the
    number of cores that the scheduler happened to have (`threads`).

    Raises:
        InputError: there are several nodes, and no scheduler that started a process on each; there are not
            as many GPUs as asked for.
    """
    wanted, devices, nodes = training["threads"], training.get("devices", 1), training.get("num_nodes", 1)
    if threads < wanted * devices:
        log.warning(
            "training.threads: %d, but the job has %d cores; it will be slow", wanted * devices, threads
        )
    if nodes > 1 and not (SLURMEnvironment.detect() or TorchElasticEnvironment.detect()):
        raise InputError(
            f"training.num_nodes: {nodes}, but nothing started a process on each; use srun or torchrun"
        )
    device = choose_device(training["device"], devices, started=nodes > 1).type
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with it, and writes every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    choice: dict[str, Any] = {"devices": devices, "num_nodes": nodes}
    if devices * nodes > 1:
        choice["strategy"] = InOrder(broadcast_buffers=False)  # those that change do so alike everywhere
    # One node is one task, also in a Slurm job, which knows of one.
    own = [LightningEnvironment()] if nodes == 1 else []
    fabric = make_fabric(device, training["precision"], *own, **choice)
    if devices * nodes > 1:
        first = int(os.environ.setdefault(FIRST, str(os.getpid())))
        if first != os.getpid():
            end_with(first)
        fabric.launch()
        log.info("%d processes train together", fabric.world_size)
    torch.set_num_threads(wanted)
    return fabric


def end_with(parent: int) -> None:
    """End this process when `parent` has, which started it and for which it may wait for half an hour."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class InOrder(DDPStrategy):
    """DDP whose processes' gradients are added up in an order that a resumed run has too, on a CPU."""

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """The module in DDP, which begins with the first process's weights."""
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)  # DDP reads them on a stream of its own
        wrapped = super().setup_module(module)
        if self.root_device.type == "cpu":
            # A lambda: DDP refuses annotations that are strings.
            wrapped.register_comm_hook(None, lambda _, bucket: added_in_order(bucket))
        return wrapped


class Mixed(MixedPrecision):
    """Mixed precision that rounds what operations read, and not their inputs.

    Fabric's own rounds every floating-point number of a batch: in bfloat16 a distance of 2.35 angstrom by up
    to 0.008, and counts above 256.
    """

    def convert_input(self, data: Any) -> Any:
        """The same."""
        return data


def make_fabric(device: str, precision: str, *plugins: Any, **choice: Any) -> Fabric:
    """Fabric of a `training.precision`; `choice` is more of its arguments."""
    if precision == "bf16-mixed":
        return Fabric(accelerator=device, plugins=[Mixed("bf16-mixed", device), *plugins], **choice)
    return Fabric(accelerator=device, precision=precision, plugins=[*plugins], **choice)  # type: ignore[arg-type]


def run_key(fabric: Fabric, **parts: Any) -> str:
    """Hash of `parts` (settings, seed, checksums of data), `CODE`, the versions of `PACKAGES`, the device."""
    package = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for name in CODE:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(file.read_bytes())
    versions = {name: found for name, found in package_versions().items() if name in PACKAGES}
    platform = {"versions": versions, "device": fabric.device.type, "code": code.hexdigest()}
    return sha256_json({**platform, **parts})


def peak_memory(fabric: Fabric) -> float:
    """Largest memory so far (MiB): the GPU's since a run began, or the process's, with mapped caches."""
    if fabric.device.type == "cuda":
        return torch.cuda.max_memory_allocated(fabric.device) / 2**20
    return peak_rss()


def describe_session(fabric: Fabric) -> dict[str, Any]:
    """What it runs on."""
    used = {"threads": torch.get_num_threads(), "device": str(fabric.device), "processes": fabric.world_size}
    return hardware() | used
