"""What a run is a function of."""

import os
import subprocess
import sys
from pathlib import Path

from lightning_fabric import Fabric

from castbench.training import session
from castbench.training.session import CODE, run_key

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
    "cards", "config", "deviations", "errors", "provenance", "staging", "report", "report.tables",
    "compositions", "evaluation", "evaluation.aggregate", "evaluation.classification",
    "evaluation.compositions", "evaluation.statistics", "graphs", "materials", "materials.structures",
    "text", "text.tokenizer",
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
