"""Jobs that see several cards take one each; a card is free again when its job ends, however it does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from castbench import cards
from castbench.errors import InputError

JOB = """
import os, sys, time
from castbench import cards
cards.POLL = 0.05
cards.take_cards("cuda", int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


class Job:
    """A process that takes a card and holds it until it is ended."""

    def __init__(self, folder: Path, visible: str, n: int = 1):
        environment = {
            **os.environ,
            "TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": visible,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(n)], env=environment, text=True,
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


def test_a_job_with_several_cards_takes_all_at_once_or_none(tmp_path: Path):
    one = Job(tmp_path, "0,1,2")
    assert one.card() == "0"
    three = Job(tmp_path, "0,1,2", n=3)
    two = Job(tmp_path, "0,1,2", n=2)
    assert two.card() == "1,2"  # the one that waits for three holds none
    one.end()
    two.end()
    assert three.card() == "0,1,2"
    three.end()


def test_processes_that_a_job_starts_share_its_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CASTBENCH_CARDS", "0,1")
    child = Job(tmp_path, "0,1", n=2)
    assert child.card() == "0,1"
    assert not list(tmp_path.iterdir())
    child.end()


@pytest.mark.parametrize(("visible", "device"), [("3", "cuda"), ("", "auto"), ("0,1", "cpu")])
def test_one_card_none_or_a_cpu_job_leaves_nothing_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, device: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cards.take_cards(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", [{"SLURM_JOB_ID": "7"}, {"TORCHELASTIC_RUN_ID": "x"}])
def test_processes_of_a_launcher_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, launcher: dict):
    """Each sees the job's two cards, and none started the others."""
    for name, value in ({cards.VISIBLE: "0,1"} | launcher).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cards, "take", lambda *_: pytest.fail("it chose"))
    cards.take_cards("cuda", 2)
    assert os.environ[cards.VISIBLE] == "0,1"


def test_tasks_that_srun_started_on_a_node_of_more_cards_take_none_from_each_other(monkeypatch):
    for name, value in {cards.VISIBLE: "0,1,2", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cards, "take", lambda *_: pytest.fail("it chose"))
    cards.choose_device("auto", 2, started=True)
    assert os.environ[cards.VISIBLE] == "0,1,2"


def test_without_the_variable_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cards.visible_cards() == ["0", "1", "2"]


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"training.device: cuda, but torch finds no GPU"):
        cards.choose_device("cuda")
    assert cards.choose_device("auto", 2).type == "cpu"  # processes, there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cards, "take_cards", lambda device, n: None)
    assert cards.choose_device("auto", 2).type == "cuda"
    with pytest.raises(InputError, match=r"training.devices: 4, but torch finds 2 GPUs"):
        cards.choose_device("cuda", 4)
