"""Where kernels run: on a GPU or in the interpreter. Nothing is collected where there is no Triton."""

import pytest

import interpreter

if not interpreter.AVAILABLE:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    """Where kernels run here."""
    return interpreter.DEVICE
