"""Jobs never ask the network for the text encoder, and say in one line where it must come from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training_jobs import run_job

# Imported by Python before the verb: every attempt at a connection is written down and fails.
NO_NETWORK = """
import atexit, json, os, socket, sys

def refuse(*arguments, **options):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(repr(arguments) + "\\n")
    raise OSError("no network")

def offline():
    constants = sys.modules.get("huggingface_hub.constants")
    with open(os.environ["OFFLINE"], "w") as file:
        json.dump(constants and constants.HF_HUB_OFFLINE, file)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
atexit.register(offline)
"""


@pytest.fixture
def without_network(tmp_path: Path):
    """Run a verb in a process of its own: exit status, attempts at a connection, offline or not, errors."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    attempts, offline = tmp_path / "attempts", tmp_path / "offline"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONHASHSEED": "0"}
    environment |= {"ATTEMPTS": str(attempts), "OFFLINE": str(offline), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(arguments: list[str]) -> tuple[int, str, bool | None, str]:
        attempts.write_text("")
        ended = subprocess.run(
            [sys.executable, "-m", "castbench", *arguments], env=environment, capture_output=True, text=True
        )
        return ended.returncode, attempts.read_text(), json.loads(offline.read_text()), ended.stderr

    return run


def test_training_with_the_encoder_is_offline(data, without_network, tmp_path):
    status, attempts, offline, errors = without_network(data.train("text_only", tmp_path / "run", epochs=1))
    assert (status, attempts, offline) == (0, "", True), errors
    assert json.loads((tmp_path / "run/0/metrics.json").read_text())["status"] == "finished"


def test_pretraining_is_offline(data, without_network, tmp_path):
    status, attempts, offline, errors = without_network(data.pretrain("masked_node", tmp_path / "0"))
    assert (status, attempts, offline) == (0, "", True), errors


def test_tokenizing_and_embedding_are_offline(data, without_network, tmp_path):
    tokens, encoder = str(tmp_path / "tokens"), str(data.root / "encoder")
    descriptions = str(data.root / "descriptions.parquet")
    cut = ["tokenize_text", "--settings", '{"max_tokens": 16}', "--descriptions", descriptions]
    embed = ["embed_text", "--tokens", tokens, "--remaining", "0", "--output", str(tmp_path / "states")]
    for arguments in (
        [*cut, "--encoder", encoder, "--output", tokens],
        [*embed, "--encoder", encoder, "--device", "cpu"],
    ):
        status, attempts, offline, errors = without_network(arguments)
        assert (status, attempts, offline) == (0, "", True), errors


def test_the_prefetch_asks_the_hub_and_says_what_to_do_without_it(without_network, tmp_path):
    folder = tmp_path / "encoders" / "matscibert"
    status, attempts, offline, errors = without_network(
        ["prefetch_encoder", "--encoder", "matscibert", "--output", str(folder)]
    )
    assert status == 2 and attempts and not offline
    assert len(errors.splitlines()) == 1 and "Traceback" not in errors
    assert "run the rule prefetch_encoder where there is a network, such as a login node" in errors
    assert f"copy the folder {folder} here" in errors


def remove(encoder: Path) -> None:
    shutil.rmtree(encoder)


def cut_short(encoder: Path) -> None:
    weights = encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [remove, cut_short])
@pytest.mark.parametrize("name", ["text_only", "crysmmnet_lora"])
def test_a_training_job_names_the_rule_and_the_folder(data, tmp_path, name, damage):
    check_message(data.train(name, tmp_path / "run"), data.root / "encoder", damage, tmp_path)


@pytest.mark.parametrize("name", ["crysmmnet_frozen", "cast_scratch", "cast"])
def test_so_does_a_job_on_cached_states(data, tmp_path, name):
    check_message(data.train(name, tmp_path / "run"), data.root / "encoder", remove, tmp_path)


@pytest.mark.parametrize("objective", ["masked_node", "contrastive"])
def test_so_does_a_pretraining(data, tmp_path, objective):
    check_message(data.pretrain(objective, tmp_path / "0"), data.root / "encoder", remove, tmp_path)


def check_message(arguments: list[str], encoder: Path, damage, tmp_path: Path) -> None:
    """Run the command with a damaged copy of the encoder."""
    damaged, log = tmp_path / "encoder", tmp_path / "job.log"
    shutil.copytree(encoder, damaged)
    damage(damaged)
    arguments = [str(damaged) if word == str(encoder) else word for word in arguments]
    assert run_job([*arguments, "--log", str(log)]) == 2
    errors = [line for line in log.read_text().splitlines() if " ERROR " in line]
    assert len(errors) == 1 and "Traceback" not in log.read_text()
    assert "run the rule prefetch_encoder where there is a network, such as a login node" in errors[0]
    assert f"copy the folder {damaged} here" in errors[0]
