"""Where a file came from: hashes, versions, hardware. And writing files that are whole or not there."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from castbench.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP)  # what a file system says that does not sync folders

PACKAGES = (
    "torch", "transformers", "peft", "lightning-fabric", "pymatgen", "pymatgen-core",
    "robocrys", "matminer", "smact", "ElementEmbeddings", "scikit-learn", "spglib", "numpy", "scipy",
    "pandas", "pyarrow", "snakemake",
)  # fmt: skip


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; synced, it takes the name `path` only if the block succeeds.

    The folder is synced too, so that the new name outlives a machine that loses its power.

    Raises:
        InputError: the disk is full, a quota or a limit reached.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = os.strerror(error.errno).lower()
        raise InputError(f"{path}: cannot be written ({what}); make space and start again") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and write in it while no other process does so by this function.

    What killed processes left half-written there is removed. Nobody is kept out where the file system has no
    locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(".*.partial"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system offers that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, atomically. NaN and infinity are refused: a missing value is null."""
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextmanager
def measured(path: Path) -> Iterator[None]:
    """Write to `path` the seconds that the block takes: by the clock, and of the CPU with child processes."""
    clock, cpu = time.monotonic(), cpu_seconds()
    yield
    spent = {"seconds": time.monotonic() - clock, "cpu_seconds": cpu_seconds() - cpu}
    write_json(path, {name: round(value, 3) for name, value in spent.items()})


def cpu_seconds() -> float:
    """CPU time (s) of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def peak_rss() -> float:
    """Largest resident memory of this process so far (MiB), with mapped files."""
    with suppress(OSError):  # Linux; getrusage counts what the process was before it became this program
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """SHA-256 of the canonical JSON of `content`: the key of a cache's settings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@cache
def code_version() -> str:
    """Commit of the working tree, "-dirty" where it has changes, "unknown" outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on, and Python's."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Processor, its core count, memory (GB), and the GPUs if torch is loaded and sees any."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "gpus": gpus}
