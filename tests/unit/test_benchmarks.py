"""The benchmarks start as they are documented, from any folder, with nothing on the path."""

import os
import subprocess
import sys
from pathlib import Path

LOAD = """
import runpy, sys
from pathlib import Path
for file in sorted(Path(sys.argv[1]).glob("*.py")):
    path = list(sys.path)
    sys.path.insert(0, str(file.parent))  # as Python does
    assert "main" in runpy.run_path(str(file), run_name=file.stem)
    sys.path[:] = path
"""


def start(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, text=True, check=True, stdout=subprocess.PIPE
    )
    return ended.stdout


def test_every_script_loads(root: Path, tmp_path: Path):
    start(tmp_path, "-W", "ignore", "-c", LOAD, str(root / "tests" / "benchmarks"))


def test_graphs_are_simulated_and_the_last_line_is_a_ratio(root: Path, shared_data: Path, tmp_path: Path):
    script = root / "tests" / "benchmarks" / "graphs.py"
    printed = start(tmp_path, str(script), "--crystals", "2", "--simulated", "5")
    assert "5 simulated" in printed
    assert printed.splitlines()[-1].startswith("ratio ")
