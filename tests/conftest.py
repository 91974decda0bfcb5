"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest

# A thread for each of pytest's workers: torch's threads of several wait for one another, for five times the work.
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
