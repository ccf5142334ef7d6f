"""What a project's tests may do on the two sides; jaxext is loaded on one of them alone."""

import sys
import unittest

import pytest

JAXEXT = "jaxext" in sys.modules


def test_passes():
    pass


def test_fails_on_stock():
    assert JAXEXT


def test_regresses():
    assert not JAXEXT, "the first line\nand the second"


def test_fails_as_known():
    assert not JAXEXT


def test_passes_unexpectedly():
    pass


@pytest.mark.skip(reason="never")
def test_is_skipped():
    pass


@pytest.fixture
def breaks():
    yield
    assert not JAXEXT, "in teardown"


def test_teardown_breaks(breaks):
    pass


class TestClass(unittest.TestCase):
    def test_parts(self):
        for part in range(2):
            with self.subTest(part=part):
                assert not (JAXEXT and part == 0), "the first part"


if not JAXEXT:

    def test_vanishes():
        pass


def test_runs_a_kernel():
    import jax
    import jax.numpy as jnp

    if JAXEXT:
        import jaxext

        assert jaxext.is_installed()
    query = jnp.ones((1, 128, 2, 16))
    loss = jax.grad(lambda q: jax.nn.dot_product_attention(q, q, q).sum())
    assert jax.jit(loss)(query).shape == query.shape
