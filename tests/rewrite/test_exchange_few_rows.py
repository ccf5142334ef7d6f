"""A few float32 rows times a matrix, as in a recurrent step: one kernel call each, as exact as stock; others left."""

import jax
import jax.numpy as jnp
import pytest
from exchanged import arrays, assert_exact, details, needs_avx512, products

import jaxext

pytestmark = needs_avx512


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(16, 256, 1024), (8, 512, 512), (50, 384, 768), (64, 130, 1040)])
def test_few_rows_times_a_matrix(m, k, n, turned):
    x, w = arrays((m, k), (n, k) if turned else (k, n))

    def product(x, w):
        return jnp.einsum("mk,nk->mn", x, w) if turned else x @ w

    assert products(product, x, w) == 1
    assert_exact(product, x, w)


def test_each_step_of_a_recurrent_loop_and_of_its_gradient():
    x, h, w = arrays((12, 16, 512), (16, 512), (512, 512))
    w = w / 20

    def gradients(h, w, x):
        def loss(h, w):
            return jnp.sum(jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), h, x)[0] ** 2)

        return jax.grad(loss, argnums=(0, 1))(h, w)

    # The product of the step and that of its cotangent; the matrix's gradient leaves the loop, many rows at once.
    assert products(gradients, h, w, x) == 2
    assert_exact(gradients, h, w, x)


@pytest.mark.parametrize(
    ("why", "m", "k", "n"),
    [
        ("too few rows", 4, 512, 512),
        ("many rows", 65, 512, 512),
        ("a small matrix", 64, 256, 256),
        ("a matrix beyond the caches", 16, 1024, 2048),
        ("columns that are no whole registers", 16, 512, 520),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_is_left_to_stock(why, m, k, n):
    x, w = arrays((m, k), (k, n))
    assert products(lambda x, w: x @ w, x, w) == 0


def test_precision_that_was_asked_for_is_left_to_stock():
    x, w = arrays((16, 512), (512, 512))
    assert products(lambda x, w: jnp.dot(x, w, precision="highest"), x, w) == 0


def test_the_report_names_it():
    x, w = arrays((16, 512), (512, 512))
    assert details("matmul", lambda x, w: x @ w, x, w) == [""]
    assert jaxext.accelerate(lambda x, w: x @ w, exclude="matmul").lower(x, w).as_text().count("jaxext_") == 0
