import pytest

from small_study import write_study


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Ten crystals with descriptions, and untrained runs: read only."""
    return write_study(tmp_path_factory.mktemp("study") / "results")


@pytest.fixture(scope="session")
def encoder(study):
    return study.parent / "encoders" / "bert"
