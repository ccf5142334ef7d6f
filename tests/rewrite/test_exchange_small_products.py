"""Batches of small float32 products: one kernel call each, as exact as stock; what stock does better is left to it."""

import jax
import jax.numpy as jnp
import pytest
from exchanged import arrays, assert_exact, details, needs_avx512, products

import jaxext

pytestmark = needs_avx512

WAYS = {"a b": "bmk,bkn->bmn", "a' b": "bkm,bkn->bmn", "a b'": "bmk,bnk->bmn", "a' b'": "bkm,bnk->bmn"}


def operands(way, batch, m, k, n):
    sizes = {"b": batch, "m": m, "k": k, "n": n}
    left, right = WAYS[way].split("->")[0].split(",")
    return arrays(*(tuple(sizes[name] for name in names) for names in (left, right)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("batch", "m", "k", "n"),
    [(2048, 27, 16, 27), (64, 27, 27, 16), (32, 16, 8, 9), (33, 128, 64, 64), (17, 61, 33, 50), (40, 19, 128, 37)],
)
def test_many_small_products(batch, m, k, n, way):
    a, b = operands(way, batch, m, k, n)
    function = lambda a, b: jnp.einsum(WAYS[way], a, b)  # noqa: E731
    assert products(function, a, b) == 1
    assert_exact(function, a, b)


@pytest.mark.parametrize(("m", "k", "n"), [(4, 4, 4), (5, 64, 64), (13, 21, 5), (32, 16, 4)])
def test_the_smallest_sides_where_nothing_is_turned(m, k, n):
    a, b = operands("a b", 512, m, k, n)
    assert products(jnp.matmul, a, b) == 1
    assert_exact(jnp.matmul, a, b)


def test_interactions_of_features_and_their_gradient():
    features, weights = arrays((256, 27, 16), (27, 27))

    def gradient(features):
        return jax.grad(lambda f: jnp.sum(weights * jnp.einsum("bif,bjf->bij", f, f) ** 2))(features)

    assert products(gradient, features) == 3
    assert_exact(gradient, features)


def test_several_dimensions_of_a_batch():
    a, b = arrays((3, 8, 20, 24), (3, 8, 24, 40))
    assert products(jnp.matmul, a, b) == 1
    assert_exact(jnp.matmul, a, b)


@pytest.mark.parametrize(
    ("why", "way", "sizes"),
    [
        ("few products", "a b", (15, 32, 32, 32)),
        ("little work", "a b", (16, 8, 8, 8)),
        ("large products", "a b", (16, 128, 128, 64)),
        ("many columns", "a b", (16, 32, 32, 65)),
        ("a vector", "a b", (64, 32, 32, 1)),
        ("few columns of many rows", "a b", (64, 128, 64, 4)),
        ("turned for few rows", "a b'", (64, 15, 64, 64)),
        ("turned for few steps", "a b'", (64, 128, 4, 64)),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_is_left_to_stock(why, way, sizes):
    a, b = operands(way, *sizes)
    assert products(lambda a, b: jnp.einsum(WAYS[way], a, b), a, b) == 0


def test_operands_that_would_be_transposed_first_are_left_to_stock():
    a, b = arrays((27, 64, 16), (27, 64, 16))
    assert products(lambda a, b: jnp.einsum("ibf,jbf->bij", a, b), a, b) == 0


def test_precision_that_was_asked_for_is_left_to_stock():
    a, b = arrays((64, 32, 32), (64, 32, 32))
    assert products(lambda a, b: jnp.matmul(a, b, precision="highest"), a, b) == 0


def test_switched_off_it_is_stock():
    a, b = arrays((64, 32, 32), (64, 32, 32))
    assert details("matmul", jnp.matmul, a, b) == [""]
    assert jaxext.accelerate(jnp.matmul, exclude="matmul").lower(a, b).as_text().count("jaxext_") == 0
