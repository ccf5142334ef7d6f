"""Every test process sees eight CPU devices, so that sharding and pipelines are tested wherever the suite runs."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_sources(tmp_path_factory):
    """`python -m jaxext` in the checkout would find the sources there, which have no compiled module beside them."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)
