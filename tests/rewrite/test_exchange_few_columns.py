"""Two tall float32 matrices of few columns, as in a narrow layer's gradient: one kernel call, as exact as stock."""

import jax
import jax.numpy as jnp
import pytest
from exchanged import arrays, assert_exact, needs_avx512, products

import jaxext

pytestmark = needs_avx512


def over_rows(x, g, precision=None):
    return jnp.einsum("km,kn->mn", x, g, precision=precision)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(64, 4096, 64), (4, 4096, 64), (64, 4096, 2), (2, 40000, 3), (31, 257, 127), (128, 999, 17), (16, 8193, 3)],
)
def test_tall_matrices_multiplied_over_their_rows(m, k, n):
    x, g = arrays((k, m), (k, n))
    assert products(over_rows, x, g) == 1
    assert_exact(over_rows, x, g)


def test_the_weight_gradients_of_a_narrow_network():
    x, w, v = arrays((2048, 6), (6, 48), (48, 3))

    def gradients(w, v, x):
        return jax.grad(lambda w, v: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ v) ** 2), argnums=(0, 1))(w, v)

    assert products(gradients, w, v, x) == 2
    assert_exact(gradients, w, v, x)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_reaches_its_row_and_column_only(value):
    x, g = arrays((1024, 24), (1024, 40))
    x, g = x.at[700, 5].set(value), g.at[3, 39].set(value)
    assert products(over_rows, x, g) == 1
    ours = jaxext.accelerate(over_rows)(x, g)
    assert (jnp.isfinite(ours) == jnp.isfinite(over_rows(x, g))).all()


@pytest.mark.parametrize(
    ("why", "m", "k", "n"),
    [
        ("many columns", 64, 1024, 129),
        ("one column", 64, 4096, 1),
        ("few rows", 64, 255, 64),
        ("little work", 2, 4096, 2),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_is_left_to_stock(why, m, k, n):
    x, g = arrays((k, m), (k, n))
    assert products(over_rows, x, g) == 0


def test_precision_that_was_asked_for_is_left_to_stock():
    x, g = arrays((1024, 32), (1024, 32))
    assert products(lambda x, g: over_rows(x, g, precision="highest"), x, g) == 0
