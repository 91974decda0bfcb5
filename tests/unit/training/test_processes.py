"""Several processes that train one model together: losses of one process, and bytes of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from castbench.errors import InputError
from castbench.models import OBJECTIVES
from castbench.training.session import open_session
from castbench.training.share import Share
from composition_data import aggregated, composition_settings, rows, split
from training_jobs import bytes_of, run_job, run_together, words

TWO: dict[str, Any] = {"devices": 2}
PLAIN = ["structure_only", "crysmmnet_frozen", "crysmmnet_lora", "cast_scratch"]


def steady(command: list[str]) -> list[str]:
    """The command without dropout, which every process draws on its own."""
    at = command.index("--settings") + 1
    settings = json.loads(
        command[at], object_hook=lambda part: part | ({"dropout": 0.0} if "dropout" in part else {})
    )
    return [*command[:at], json.dumps(settings), *command[at + 1 :]]


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def compare(first: Path, second: Path) -> None:
    """Losses of every epoch and the weights of two runs agree to 1e-5."""
    pd.testing.assert_frame_equal(history(first), history(second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_pretrain_with_the_losses_of_one(data, tmp_path, objective):
    alone, other = tmp_path / "one" / "0", tmp_path / "writes nothing" / "0"
    together = tmp_path / "two" / "0"
    assert run_job(steady(data.pretrain(objective, alone))) == 0
    commands = [steady(data.pretrain(objective, folder, **TWO)) for folder in (together, other)]
    assert run_together(commands) == [0, 0]
    compare(together, alone)
    assert not other.parent.exists()
    assert json.loads((together / "cost.json").read_text())["hardware"]["processes"] == 2


@pytest.mark.parametrize("model", PLAIN)
def test_two_processes_train_with_the_losses_of_one(data, tmp_path, model):
    assert run_job(steady(data.train(model, tmp_path / "one"))) == 0
    commands = [steady(data.train(model, tmp_path / name, **TWO)) for name in ("two", "writes nothing")]
    assert run_together(commands) == [0, 0]
    compare(tmp_path / "two" / "0", tmp_path / "one" / "0")
    first, second = (
        pd.read_parquet(tmp_path / name / "0" / "predictions.parquet") for name in ("one", "two")
    )
    pd.testing.assert_frame_equal(first, second, rtol=1e-4)
    assert not (tmp_path / "writes nothing").exists()


def test_two_processes_train_compositions_with_the_losses_of_one(tmp_path):
    """Also where a target is missing in one part of a batch, and with learned weights of the targets."""
    content = rows()
    for row in content[::2]:
        row["gap"] = ""
    folder = aggregated(tmp_path, content)
    split(folder)

    def command(output: Path, **training: Any) -> list[str]:
        return words(
            "train_compositions",
            settings=composition_settings(task_weights="learned", **training),
            model="edm_transformer",
            seeds=[0],
            compositions=folder / "compositions.parquet",
            split=folder / "split.json",
            output=output,
            threads=1,
        )

    assert run_job(steady(command(tmp_path / "one"))) == 0
    commands = [steady(command(tmp_path / name, **TWO)) for name in ("two", "writes nothing")]
    assert run_together(commands) == [0, 0]
    compare(tmp_path / "two" / "0", tmp_path / "one" / "0")
    assert not (tmp_path / "writes nothing").exists()


def test_stopped_and_killed_processes_end_with_the_bytes_of_an_unbroken_run(data, tmp_path):
    """The signal comes to the last process, which writes nothing; dropout is on.

    Of three processes: the sum of two gradients has the same bits in any order.
    """
    command, unbroken = (data.train("cast_scratch", tmp_path / name, devices=3) for name in ("b", "a"))
    assert run_together([unbroken] * 3) == [0] * 3
    assert run_together([command] * 3, stop=3, number=signal.SIGTERM) == [143] * 3
    checkpoints = (tmp_path / "b" / "checkpoints" / "0").glob("*.safetensors")
    assert [path.name.split("-")[1] for path in checkpoints] == ["000000003"]
    *others, last = run_together([command] * 3, interval=0, stop=4)
    assert 0 not in others and last == -signal.SIGKILL
    assert run_together([command] * 3) == [0] * 3
    assert bytes_of(tmp_path / "b" / "0") == bytes_of(tmp_path / "a" / "0")


def test_processes_that_do_not_see_the_same_checkpoint_are_refused(data, tmp_path):
    command, other = (data.train("structure_only", tmp_path / name, **TWO) for name in ("b", "elsewhere"))
    assert run_together([command] * 2, stop=3, number=signal.SIGTERM) == [143, 143]
    log = ["--log", str(tmp_path / "log")]
    assert run_together([[*command, *log], other]) == [2, 2]
    assert "not the same on all nodes; put results/ on a disk" in (tmp_path / "log").read_text()


def test_another_number_of_processes_starts_anew(data, tmp_path):
    assert run_job(data.train("structure_only", tmp_path / "b"), interval=0, stop=9) == -signal.SIGKILL
    log = ["--log", str(tmp_path / "log")]
    assert run_together([[*data.train("structure_only", tmp_path / "b", **TWO), *log]] * 2) == [0, 0]
    assert "of other settings, data or code" in (tmp_path / "log").read_text()
    assert "2 processes train together" in (tmp_path / "log").read_text()


def test_the_command_starts_its_processes_itself(data, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = steady(data.train("structure_only", tmp_path / "two", epochs=1, **TWO))
    ended = subprocess.run(
        [sys.executable, "-m", "castbench", *command], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 processes train together") == 1
    assert run_job(steady(data.train("structure_only", tmp_path / "one", epochs=1))) == 0
    compare(tmp_path / "two" / "0", tmp_path / "one" / "0")


def test_processes_of_two_nodes_that_srun_started_train_together(data, tmp_path):
    nodes: dict[str, Any] = {"num_nodes": 2, "epochs": 1}
    assert run_job(steady(data.train("structure_only", tmp_path / "one", epochs=1))) == 0
    commands = [steady(data.train("structure_only", tmp_path / name, **nodes)) for name in ("two", "nothing")]
    assert run_together(commands, slurm=True) == [0, 0]
    compare(tmp_path / "two" / "0", tmp_path / "one" / "0")
    assert not (tmp_path / "nothing").exists()


def test_a_process_ends_with_the_one_that_started_it():
    """Else it would wait for it at the rendezvous for half an hour."""
    child = "import os, time; from castbench.training.session import end_with; first = os.getppid(); "
    child += "print('up', flush=True); end_with(first); time.sleep(20); print('late')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout and first.stdout.readline() == "up\n"
    first.kill()
    assert first.stdout.read() == ""  # to its end, which is the child's
    first.wait()


def test_several_nodes_without_a_scheduler_are_refused():
    with pytest.raises(InputError, match=r"num_nodes: 2, but nothing started a process on each; use srun"):
        open_session({"threads": 1, "num_nodes": 2}, 1)


def test_a_macs_gpu_is_not_taken(monkeypatch):
    monkeypatch.setattr("lightning_fabric.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training = {"threads": 1, "device": "auto", "precision": "32-true"}
    assert open_session(training, 1).device.type == "cpu"


def test_parts_make_up_the_batch_and_a_small_one_is_refused():
    parts = [Share(rank, 3).of(torch.arange(8)).tolist() for rank in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7]]
    with pytest.raises(InputError, match="a batch of 2 cannot be shared by 3 processes"):
        Share(0, 3).of(torch.arange(2))
