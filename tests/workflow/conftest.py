"""A clone of the working tree in which the workflow runs, so that no test touches the user's results."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def snakemake() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Snakemake in a folder with the interpreter of the tests first on the path."""

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "snakemake", *arguments]
        return subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": path}, text=True, timeout=1500,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copy what git would commit, and the text encoder if it was fetched already."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("clone") / "castbench"
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        encoders = ROOT / "results" / "encoders"
        if encoders.is_dir():
            shutil.copytree(encoders, folder / "results" / "encoders", dirs_exist_ok=True)
        return folder

    return copy
