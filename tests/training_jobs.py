"""A verb in a process of its own, which can be stopped at a step; forked from a server that has torch."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [f"castbench.training.{verb}" for verb in ("train", "pretrain", "compositions")]
    + [f"castbench.models.{idea}" for idea in ("cogn", "congn", "alignn", "cgcnn", "megnet", "structure")]
    + [f"castbench.models.{idea}" for idea in ("concat", "contrastive", "cross_attention", "text")]
    + [f"castbench.models.{idea}" for idea in ("crabnet", "edm_transformer")]
    + ["castbench.cli", "castbench.text.encoders", "peft", "torch._dynamo"]
)
KILLS, KILLED = 10, -signal.SIGKILL


def _kill_at(point: int) -> None:
    """Let this process be killed at its `point`-th event, from 1.

    Events are the end of a step, and with every file: when half of it is written, when it is whole but not
    synced, before it gets its name, and after.
    """
    from castbench.training import loop

    passed = 0

    def event() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any], before: bool, after: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if before:
                event()
            found = function(*arguments)
            if after:
                event()
            return found

        return call

    def write_bytes(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            event()
            return file.write(content[len(content) // 2 :])

    loop.Trainer.advance = watched(loop.Trainer.advance, before=False, after=True)  # type: ignore[method-assign]
    os.fsync = watched(os.fsync, before=True, after=False)
    Path.replace = watched(Path.replace, before=True, after=True)  # type: ignore[method-assign]
    Path.write_bytes = write_bytes  # type: ignore[method-assign,assignment]


def _job(
    arguments: list[str], interval: float, stop: int, number: int, point: int, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    os.environ["GIT_DIR"] = os.devnull  # the commit in metrics.json must not change while the tests run
    from castbench import cli
    from castbench.training import loop

    loop.CHECKPOINT_SECONDS = interval
    advance, steps = loop.Trainer.advance, 0

    def counting(self: loop.Trainer, rows):
        nonlocal steps
        loss = advance(self, rows)
        steps += 1
        if steps == stop:
            os.kill(os.getpid(), number)
        return loss

    loop.Trainer.advance = counting  # type: ignore[method-assign]
    if point:
        _kill_at(point)
    raise SystemExit(cli.main(arguments))


def _start(arguments: list[str], *options: Any) -> Any:
    process = SERVER.Process(target=_job, args=(arguments, *options))
    # Python 3.11's server ignores sys.path, and then silently preloads nothing.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment):
        process.start()
    return process


def _exit_status(process: Any) -> int:
    process.join(300)  # importing torch on a busy machine takes a minute
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the job hangs")
    return process.exitcode


def run_job(
    arguments: list[str], interval: float = 30.0, stop: int = 0, number: int = signal.SIGKILL, point: int = 0
) -> int:
    """Run a verb with checkpoints every `interval` seconds; it gets the signal `number` in its step `stop`.

    With `point`, it is killed at that event, see `_kill_at`.
    Returns its exit status, negative for the signal that ended it.
    """
    return _exit_status(_start(arguments, interval, stop, number, point, {}))


def run_beside(commands: list[list[str]], interval: float = 30.0) -> list[int]:
    """Run verbs at the same time as processes that know nothing of each other. See `run_job`."""
    return [_exit_status(one) for one in [_start(command, interval, 0, 0, 0, {}) for command in commands]]


def run_together(
    commands: list[list[str]],
    interval: float = 30.0,
    stop: int = 0,
    number: int = signal.SIGKILL,
    slurm: bool = False,
) -> list[int]:
    """Run a verb as processes that train together; the last of them gets the signal. See `run_job`.

    With `slurm`, their environment is that of srun with a process on each node.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank, arguments in enumerate(commands):
        last = rank + 1 == len(commands)
        place = {"LOCAL_RANK": str(rank)}
        if slurm:
            place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
            place |= {"SLURM_NTASKS": str(len(commands)), "SLURM_NTASKS_PER_NODE": "1"}
            place |= {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(_start(arguments, interval, stop * last, number, 0, place))
    return [_exit_status(process) for process in processes]


def words(verb: str, **arguments: Any) -> list[str]:
    """A command line."""
    line = [verb]
    for name, value in arguments.items():
        text = (
            [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        )
        line += [f"--{name}", *map(str, text)]
    return line


def killed_and_unbroken(
    command: Callable[[Path], list[str]], folder: Path, run: str, steps: int
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of a run that was killed at ten random events, and of one that was not.

    The environment variable CASTBENCH_KILL_ROUNDS asks for more than one that was killed.

    Args:
        command: gives the command line that writes to a folder.
        folder: for both.
        run: the run's place in that folder.
        steps: of the run; events are drawn so that ten of them come about to its end.
    """
    assert run_job(command(folder / "unbroken")) == 0
    expected = bytes_of(folder / "unbroken" / run)
    for attempt in range(int(os.environ.get("CASTBENCH_KILL_ROUNDS", "1"))):
        killed = folder / f"killed{attempt}"
        draw = random.Random(f"{command(Path())[:9]} {attempt}")
        for _ in range(KILLS):
            assert run_job(command(killed), interval=0, point=draw.randint(1, round(1.1 * steps))) == KILLED
        assert run_job(command(killed), interval=0) == 0
        assert not [*killed.rglob(".*.partial")], "half-written files of killed processes are left"
        found = bytes_of(killed / run)
        if found != expected:
            break
    return found, expected


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a run, but for its cost, which has seconds in it."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "cost.json"}
