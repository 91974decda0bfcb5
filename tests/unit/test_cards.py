"""Jobs that see several cards take one each; a card is free again when its job ends, however it does."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castbench import cards

JOB = """
import os, sys, time
from castbench import cards
cards.POLL = 0.05
cards.take_cards("cuda", int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


class Job:
    """A process that takes cards and holds them until it is ended."""

    def __init__(self, folder: Path, visible: str, count: int = 1):
        environment = {
            **os.environ,
            "TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": visible,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(count)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def card(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_every_job_has_a_card_of_its_own_and_waits_where_there_is_none(tmp_path: Path):
    first, second = Job(tmp_path, "0,GPU-5a,"), Job(tmp_path, "0,GPU-5a,")
    taken = {first.card(): first, second.card(): second}
    assert set(taken) == {"0", "GPU-5a"}
    third = Job(tmp_path, "0,GPU-5a,")
    time.sleep(0.5)
    assert third.process.poll() is None
    taken["GPU-5a"].end()
    assert third.card() == "GPU-5a"
    third.end()
    taken["0"].end()


def test_a_job_on_several_cards_takes_all_or_waits_and_holds_none(tmp_path: Path):
    one = Job(tmp_path, "0,1,2")
    assert one.card() == "0"
    two, waiting = Job(tmp_path, "0,1,2", count=2), Job(tmp_path, "0,1,2", count=2)
    time.sleep(1.0)
    one.end()
    ready = select.select([two.process.stdout, waiting.process.stdout], [], [], 60)[0]
    assert len(ready) == 1
    first = two if ready[0] is two.process.stdout else waiting
    second = waiting if first is two else two
    assert first.card() in ("1,2", "0,1", "0,2")
    first.end()
    assert second.card() == "0,1"
    second.end()


@pytest.mark.parametrize(("visible", "device"), [("3", "cuda"), ("", "auto"), ("0,1", "cpu")])
def test_one_card_none_or_a_cpu_job_leaves_nothing_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, device: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cards.take_cards(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert not list(tmp_path.iterdir())


def test_without_the_variable_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cards.visible_cards() == ["0", "1", "2"]
