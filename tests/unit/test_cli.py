"""The command line turns signatures into arguments and bad input into one line."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castbench import cli
from castbench.errors import InputError


def test_every_verb_exists_and_is_documented():
    for verb, module in cli.VERBS.items():
        function = getattr(importlib.import_module(module), verb)
        assert inspect.getdoc(function), verb


def test_every_rule_calls_the_verb_of_its_name(root: Path):
    rules = {}
    for file in (root / "workflow" / "rules").glob("*.smk"):
        name = None
        for line in file.read_text().splitlines():
            if line.strip().startswith("rule "):
                name = line.strip().removeprefix("rule ").rstrip(":")
            if "python -m castbench" in line:
                rules[name] = line.split("castbench ")[1].split()[0].strip('"')
    assert set(rules) == set(cli.VERBS) - {
        "explain",
        "predict",
    }  # which people call for crystals of their own
    assert all(rule == verb for rule, verb in rules.items())


def test_arguments_come_from_the_signature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    received = {}

    def collect_materials(settings: dict, output: Path, seeds: list[int], states: Path | None = None) -> None:
        received.update(settings=settings, output=output, seeds=seeds, states=states)

    monkeypatch.setattr("castbench.materials.sources.collect_materials", collect_materials)
    settings = {"source": "demo", "path": 'a "quoted" name'}
    arguments = [
        "collect_materials",
        "--settings",
        json.dumps(settings),
        "--output",
        "x",
        "--seeds",
        "1",
        "2",
    ]
    assert cli.main([*arguments, "--log", str(tmp_path / "a.log")]) == 0
    assert received == {"settings": settings, "output": Path("x"), "seeds": [1, 2], "states": None}


def test_bad_input_is_one_line_and_status_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def split_materials(settings: dict) -> None:
        raise InputError("mp-1: no structure; give one")

    monkeypatch.setattr("castbench.materials.splits.split_materials", split_materials)
    log = tmp_path / "split.log"
    assert cli.main(["split_materials", "--settings", "{}", "--log", str(log)]) == 2
    assert "mp-1: no structure; give one" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_full_gpu_is_one_line_also_where_it_came_to_another_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def split_materials(settings: dict) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        finally:
            raise RuntimeError("the recording failed")

    monkeypatch.setattr("castbench.materials.splits.split_materials", split_materials)
    log = tmp_path / "split.log"
    assert cli.main(["split_materials", "--settings", "{}", "--log", str(log)]) == 2
    assert "CUDA out of memory; lower training.batch_size" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def split_materials(settings: dict) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("castbench.materials.splits.split_materials", split_materials)
    log = tmp_path / "split.log"
    assert cli.main(["split_materials", "--settings", "{}", "--log", str(log)]) == 1
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_only_the_prefetch_may_ask_the_hub(monkeypatch: pytest.MonkeyPatch, verb: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", "as the user has it")
    with pytest.raises(SystemExit):  # arguments are missing
        cli.main([verb])
    expected = "as the user has it" if verb == "prefetch_encoder" else "1"
    assert os.environ["HF_HUB_OFFLINE"] == expected


def test_an_unknown_verb_lists_the_known_ones(root: Path):
    ended = subprocess.run(
        [sys.executable, "-m", "castbench", "train"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root / "src"), "PATH": ""},
    )
    assert ended.returncode == 2
    assert "train_model" in ended.stderr
