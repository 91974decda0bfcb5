"""A verb in a process of its own, which can be stopped at a step; forked from a server that has torch."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [f"castbench.training.{verb}" for verb in ("train", "pretrain")]
    + [
        f"castbench.models.{module}"
        for module in (
            "cogn",
            "structure",
            "congn",
            "alignn",
            "cgcnn",
            "megnet",
            "concat",
            "contrastive",
            "cross_attention",
            "text",
        )
    ]
    + ["castbench.cli", "castbench.text.encoders", "peft", "torch._dynamo"]
)


def _job(arguments: list[str], interval: float, stop: int, number: int) -> None:
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
    raise SystemExit(cli.main(arguments))


def run_job(arguments: list[str], interval: float = 30.0, stop: int = 0, number: int = signal.SIGKILL) -> int:
    """Run a verb with checkpoints every `interval` seconds; it gets the signal `number` in its step `stop`.

    Returns its exit status, negative for the signal that ended it.
    """
    process = SERVER.Process(target=_job, args=(arguments, interval, stop, number))
    # Python 3.11's server ignores sys.path, and then silently preloads nothing.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment):
        process.start()
    process.join(300)  # importing torch on a busy machine takes a minute
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a run, but for its cost, which has seconds in it."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "cost.json"}
