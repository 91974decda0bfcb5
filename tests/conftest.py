"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest

# One thread a worker of pytest: torch's threads of several would wait for one another, five times as long.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real crystals beside the project; its tests skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real crystals: {folder} does not exist")
    return folder
