"""One copy of a cache a node, shared by its jobs, and none where it does not fit."""

import fcntl
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from castbench import staging

JOB = """
import sys
from pathlib import Path
from castbench.staging import stage_cache
copy = stage_cache(Path(sys.argv[1]))
print(copy, (copy / "values.npy").read_bytes() == b"v" * 1000, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "graphs"
    folder.mkdir(parents=True)
    (folder / "values.npy").write_bytes(b"v" * 1000)
    (folder / "manifest.json").write_text("{}")
    return folder


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(cache)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_who_came_while_another_copied_reads_that_copy(tmp_path: Path, cache: Path, monkeypatch):
    """Both have seen that there is none; the other was quicker, and shares the lock to its end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flock, other, found = fcntl.flock, [], []

    def late(handle: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not other:
            (lock,) = tmp_path.glob("*/*.lock")
            shutil.copytree(cache, lock.with_suffix(""))
            other.append(os.open(lock, os.O_RDWR))
            flock(other[0], fcntl.LOCK_SH)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    thread = threading.Thread(target=lambda: found.append(staging.stage_cache(cache)), daemon=True)
    thread.start()
    thread.join(5)
    assert other and found and found[0] != cache


def test_jobs_of_a_node_share_a_copy_and_the_last_one_removes_it(tmp_path: Path, cache: Path):
    node = tmp_path / "node"
    node.mkdir()
    first = start(node, cache)
    assert first.stdout
    path, whole = first.stdout.readline().split()
    copy = Path(path)
    assert whole == "True"
    assert node in copy.parents
    inode = (copy / "values.npy").stat().st_ino
    second = start(node, cache)
    assert second.stdout
    assert second.stdout.readline().split() == [path, "True"]
    first.communicate("")
    assert (copy / "values.npy").stat().st_ino == inode  # still read
    second.communicate("")
    assert not copy.exists()


def test_what_a_killed_job_left_half_is_copied_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda _, copy, handle: os.close(handle))  # as a kill does
    copy = staging.stage_cache(cache)
    (copy / "manifest.json").unlink()
    (copy / "values.npy").write_bytes(b"v")
    assert staging.stage_cache(cache) == copy
    assert (copy / "values.npy").stat().st_size == 1000


def test_a_job_that_is_killed_while_it_removes_its_copy_leaves_none_that_counts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    released = []
    monkeypatch.setattr("atexit.register", lambda *call: released.append(call))
    copy = staging.stage_cache(cache)
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda folder, **_: (folder / "values.npy").unlink())
        for release, *given in released:
            release(*given)
    os.close(released.pop()[2])
    assert copy.is_dir()
    assert staging.stage_cache(cache) == copy
    assert (copy / "values.npy").stat().st_size == 1000


def test_a_copy_that_meets_a_quota_is_read_where_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert staging.stage_cache(cache) == cache
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "does not fit into" in caplog.text
    assert not [*tmp_path.glob("castbench-*/graphs-*/*")]


def test_a_cache_that_does_not_fit_or_is_not_there_is_read_where_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2000, 1000, 1000))
    with caplog.at_level(logging.WARNING):
        assert staging.stage_cache(cache) == cache
    assert "do not fit" in caplog.text
    assert staging.stage_cache(tmp_path / "none") == tmp_path / "none"


def test_another_cache_has_a_copy_of_its_own_that_others_cannot_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda _, copy, handle: os.close(handle))
    first = staging.stage_cache(cache)
    (cache / "values.npy").write_bytes(b"w" * 1000)
    (cache / "manifest.json").write_text('{"made": "anew"}')
    second = staging.stage_cache(cache)
    assert [(copy / "values.npy").read_bytes()[:1] for copy in (first, second)] == [b"v", b"w"]
    assert first.parent.stat().st_mode & 0o777 == 0o700


def test_the_manifest_is_copied_last(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A job that is killed while it copies leaves nothing that counts."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt if source.name == "values.npy" else AssertionError(source.name)

    monkeypatch.setattr("shutil.copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        staging.stage_cache(cache)


def test_a_copy_leaves_a_tenth_of_its_size_free(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda _, copy, handle: os.close(handle))
    usage = namedtuple("usage", "total used free")
    for free, staged in ((1100, False), (1103, True)):  # of 1,002 bytes
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(2000, 2000 - free, free))
        assert (staging.stage_cache(cache) != cache) == staged
