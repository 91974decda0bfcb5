"""What a run is a function of."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from castbench.training import session
from castbench.training.session import CODE, open_session, run_key

LOADS = """
import sys
from importlib import import_module
from castbench.models import COMPOSITION_REGISTRY, REGISTRY
from castbench.models.structure import ENCODERS
for place in (*REGISTRY.values(), *(place for place, _ in COMPOSITION_REGISTRY.values()), *ENCODERS.values()):
    import_module("castbench.models." + place.partition(":")[0])
for name in ("training.train", "training.pretrain", "training.compositions", "text.encoders"):
    import_module("castbench." + name)
print(*sorted(name for name in sys.modules if name.startswith("castbench.")))
"""
# Read, write, describe and score what others have made.
HARMLESS = {
    "cards", "deviations", "errors", "provenance", "staging", "compositions", "evaluation",
    "evaluation.classification", "evaluation.compositions", "evaluation.records", "evaluation.statistics",
    "graphs", "materials", "materials.structures", "text", "text.tokenizer",
}  # fmt: skip


def test_all_code_that_weights_come_from_is_in_the_key():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOADS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    modules = {name.removeprefix("castbench.") for name in run.stdout.split()}
    known = {place.removesuffix(".py").replace("/", ".") for place in CODE}
    left = {name for name in modules if name not in known and name.partition(".")[0] not in known}
    assert left == HARMLESS


def test_every_place_of_the_key_is_there():
    package = Path(session.__file__).parents[1]
    assert all((package / place).exists() for place in CODE)


def test_the_key_is_of_packages_too(monkeypatch):
    fabric, versions = Fabric(accelerator="cpu"), session.package_versions()
    key = run_key(fabric, seed=0)
    assert run_key(fabric, seed=0) == key != run_key(fabric, seed=1)
    for name, same in (("pymatgen", False), ("torch", False), ("snakemake", True)):
        monkeypatch.setattr(session, "package_versions", lambda name=name: versions | {name: "0"})
        assert (run_key(fabric, seed=0) == key) == same


def test_the_key_is_of_code_and_device(monkeypatch, tmp_path):
    files = [tmp_path / "models" / "deep" / "one.py", tmp_path / "labels.py"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    monkeypatch.setattr(session, "__file__", str(tmp_path / "training" / "session.py"))
    monkeypatch.setattr(session, "CODE", ("models", "labels.py"))
    keys = [run_key(SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda")]
    for file in files:
        file.write_text("2")
        keys.append(run_key(SimpleNamespace(device=torch.device("cpu"))))
    assert len(set(keys)) == 4


def test_the_config_decides_the_threads_and_operations_are_deterministic(monkeypatch):
    """Not the cores that the job has: sums depend on the number of threads."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    called = {}
    for name in ("set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda value, name=name, **_: called.update({name: value}))
    open_session({"threads": 1, "device": "cpu", "precision": "32-true"}, 8)
    assert called == {"set_num_threads": 1, "use_deterministic_algorithms": True}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_one_node_is_one_task_in_a_job_of_slurm_too(monkeypatch):
    for name, value in (("NTASKS", "1"), ("JOB_NAME", "train"), ("PROCID", "0"), ("LOCALID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    fabric = open_session({"threads": 1, "device": "cpu", "precision": "32-true"}, 1)
    assert isinstance(fabric._connector.cluster_environment, LightningEnvironment)


def test_a_job_with_too_few_cores_for_its_processes_is_warned(monkeypatch, caplog):
    monkeypatch.setattr(session, "make_fabric", lambda *_, **__: Fabric(accelerator="cpu"))
    monkeypatch.setenv(session.FIRST, str(os.getpid()))  # so that no job of another test inherits it
    settings = {"threads": 1, "device": "cpu", "precision": "32-true"}
    open_session(settings, 1)
    assert "it will be slow" not in caplog.text
    open_session(settings | {"devices": 2}, 1)
    assert "training.threads: 2, but the job has 1 cores" in caplog.text
