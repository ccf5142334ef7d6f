"""Both sides of a comparison: stock JAX, and jaxext installed."""

import contextlib

import pytest

import jaxext


@pytest.fixture
def installed():
    """jaxext is installed for the test; without memory settings, which would outlast it."""
    jaxext.install(memory="system")
    yield
    jaxext.uninstall()


@pytest.fixture
def sides(installed):
    """A context manager for each side, by its name."""
    return {"stock": jaxext.disabled, "jaxext": contextlib.nullcontext}
