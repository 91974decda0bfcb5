"""Copies of caches on a node's own disk, for results that stand on a slow shared file system.

All jobs of a node that read a cache share one copy, and so its pages in memory; the last one removes it.
"""

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

from castbench.provenance import FULL, sha256_file

log = logging.getLogger(__name__)

SPARE = 1.1  # a copy must leave a tenth of its size free


def stage_cache(folder: Path) -> Path:
    """Copy a cache (a folder with manifest.json) into $TMPDIR unless it is there; return where to read it.

    The copy is named by the hash of the manifest, which holds those of the files; without its manifest it
    does not count. Where it does not fit, and where there is no cache, that is `folder` itself.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return folder  # who reads it says what is missing
    root = Path(tempfile.gettempdir()) / f"castbench-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    copy = root / f"{folder.name}-{sha256_file(manifest)[:16]}"
    handle = os.open(copy.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    while True:  # readers share the lock, who copies or removes holds it alone
        try:  # without waiting for readers, who share it to their end
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (copy / "manifest.json").is_file() and not _copy(folder, copy):
                os.close(handle)
                return folder
        except BlockingIOError:
            pass
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits for who copies
        if (copy / "manifest.json").is_file():
            break
    atexit.register(_release, copy, handle)
    return copy


def _copy(folder: Path, copy: Path) -> bool:
    """Copy the files, the manifest last; False where they do not fit."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json")
    size = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(copy.parent).free
    if free < SPARE * size:
        log.warning("%s: %.1f GB do not fit into %s (%.1f GB free); read where it is", folder, size / 1e9,
                    copy.parent, free / 1e9)  # fmt: skip
        return False
    shutil.rmtree(copy, ignore_errors=True)  # what a killed job left
    copy.mkdir()
    try:
        for file in files:
            shutil.copyfile(file, copy / file.name)
    except OSError as error:  # a quota, or another job has filled the disk
        if error.errno not in FULL:
            raise
        shutil.rmtree(copy, ignore_errors=True)
        log.warning("%s: does not fit into %s (%s); read where it is", folder, copy.parent, error.strerror)
        return False
    log.info("%s: %.2f GB copied to %s", folder, size / 1e9, copy)
    return True


def _release(copy: Path, handle: int) -> None:
    """Remove the copy if no other job reads it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    (copy / "manifest.json").unlink(missing_ok=True)  # first: a job may be killed before all is removed
    shutil.rmtree(copy, ignore_errors=True)
