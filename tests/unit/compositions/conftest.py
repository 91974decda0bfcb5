"""The invented ABX3 compounds, collected, aggregated and split once."""

from pathlib import Path

import pytest

from composition_data import aggregated, rows, split


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with polymorphs.parquet, compositions.parquet and split.json."""
    folder = aggregated(tmp_path_factory.mktemp("compositions"), rows())
    split(folder)
    return folder
