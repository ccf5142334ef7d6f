"""Arithmetic counted from a jaxpr."""

import jax
import jax.numpy as jnp
import pytest

from jaxext.abtest.counting import count_flops, product_dtypes

SQUARE = jnp.ones((4, 4))
ONE = 2 * 4**3


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x, ONE),
        (lambda x: jnp.einsum("ab,cb->ac", x, x), ONE),
        (lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], 5 * ONE),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), 2 * ONE),
        (jax.jit(jax.checkpoint(lambda x: x @ x)), ONE),
        (lambda x: x + x, 0),
    ],
)
def test_products_are_counted(function, expected):
    assert count_flops(jax.make_jaxpr(function)(SQUARE).jaxpr) == expected


def test_convolution_is_counted():
    def convolve(x):
        return jax.lax.conv(x, jnp.ones((8, 3, 5, 5)), (1, 1), "SAME")

    assert count_flops(jax.make_jaxpr(convolve)(jnp.ones((2, 3, 10, 10))).jaxpr) == 2 * (2 * 8 * 100) * (3 * 25)


def test_dtypes_of_products_are_found_inside_loops():
    def step(x):
        low = x.astype(jnp.bfloat16)
        return jax.lax.scan(lambda c, _: (c @ c, None), low, None, length=2)[0]

    assert product_dtypes(jax.make_jaxpr(step)(SQUARE).jaxpr) == {"bfloat16"}
