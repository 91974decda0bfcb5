"""A clone of the working tree in which the workflow runs, so that no test touches the user's results."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workflow.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def snakemake(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run Snakemake in a folder, its jobs with the packages of the tests' interpreter."""
    with warm_python(tmp_path_factory.mktemp("python")) as programs:
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])

        def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "snakemake", *arguments]
            return subprocess.run(
                command, cwd=folder, env={**os.environ, "PATH": path}, text=True, timeout=1500,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

        yield run


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copy what git would commit, and the text encoder if it was fetched already."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("clone") / "my castbench"  # as folders are called
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        encoders = ROOT / "results" / "encoders"
        if encoders.is_dir():
            shutil.copytree(encoders, folder / "results" / "encoders", dirs_exist_ok=True)
        return folder

    return copy


@pytest.fixture
def rebuild_from_archive(snakemake, tmp_path: Path) -> Callable[..., set[str]]:
    """Archive a finished run, unpack it elsewhere, and rebuild the report there by the archive's own command.

    Returns the tables and figures that were made anew, as the report was, to the same bytes.
    """

    def files(results: Path) -> dict[str, bytes]:
        folders = (results / "tables", results / "figures")
        found = [results / "report.html", *(file for folder in folders for file in folder.glob("*"))]
        return {str(file.relative_to(results)): file.read_bytes() for file in found}

    def rebuild(finished: Path, dataset: str, *preset: str) -> set[str]:
        ended = snakemake(finished, "archive", *preset)
        assert ended.returncode == 0, ended.stdout[-3000:]
        with zipfile.ZipFile(finished / f"results/{dataset}/archive.zip") as archive:
            archive.extractall(tmp_path)
        folder = tmp_path / f"castbench-{dataset}"
        results = folder / f"results/{dataset}"
        listed = json.loads((folder / "archive.json").read_text())["files"]
        assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listed} == listed
        weights = [file for file in folder.rglob("*.safetensors") if "attention" not in file.parts]
        assert not weights  # nothing to train or to read weights with
        expected = files(finished / f"results/{dataset}")
        assert files(results) == expected
        (results / "report.html").unlink()
        shutil.rmtree(results / "tables")
        shutil.rmtree(results / "figures", ignore_errors=True)
        command = re.search(r"^    snakemake (.*)$", (folder / "ARCHIVE.md").read_text(), re.M)
        assert command
        ended = snakemake(folder, *shlex.split(command[1]))
        assert ended.returncode == 0, ended.stdout[-5000:]
        again = files(results)
        assert set(again) == set(expected)
        assert [name for name in expected if again[name] != expected[name]] == []
        return set(again)

    return rebuild
