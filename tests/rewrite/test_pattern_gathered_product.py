"""Products of gathered rows: multiplied before they are gathered, as exact as stock, and left alone where it loses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import arrays, assert_exact, details

import jaxext

NODES, EDGES, K, N = 60, 1600, 32, 24


def operands(*shapes, edges=EDGES, nodes=NODES):
    rng = np.random.default_rng(1)
    ids = [jnp.asarray(rng.integers(0, nodes, edges), jnp.int32) for _ in range(2)]
    return arrays(*shapes), ids


def multiplied_rows(function, *args):
    """How many rows each product has in the lowered program, largest first."""
    lines = [line for line in jaxext.accelerate(function).lower(*args).as_text().splitlines() if "dot_general" in line]
    sizes = [int(n) for line in lines for shape in re.findall(r"tensor<([0-9x]+)xf32>", line) for n in shape.split("x")]
    return sorted(sizes, reverse=True)


def pair(x, w, senders, receivers):
    return jax.nn.relu(jnp.concatenate([x[senders], x[receivers]], axis=-1) @ w)


def with_edges(x, w, senders, receivers):
    # Two parts stay as they are: features of the edges, and a table that is not larger than what is read of it.
    edges = jnp.sin(jnp.arange(EDGES * 8.0)).reshape(EDGES, 8)
    own = jnp.cos(jnp.arange(EDGES * 8.0)).reshape(EDGES, 8)[jnp.arange(EDGES) % 1590]
    return jnp.concatenate([edges, x[senders], own, x[receivers]], axis=-1) @ jnp.concatenate([w, w[:16]])


def transposed(x, w, senders, receivers):
    rows = jnp.concatenate([jnp.take(x, senders, axis=0), jnp.take(x, receivers, axis=0)], axis=-1)
    return jnp.einsum("ek,nk->en", rows, w.T)


def in_batches(x, w, senders, receivers):
    return jnp.tanh(x[senders.reshape(20, -1)] @ w[:K]) + receivers.reshape(20, -1, 1)


def squares(function):
    def step(x, w, senders, receivers):
        def loss(x, w):
            return jnp.sum(function(x, w, senders, receivers).astype(x.dtype) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    return step


WRITINGS = [pair, with_edges, transposed, in_batches]


@pytest.mark.parametrize("function", WRITINGS, ids=lambda f: f.__name__)
def test_rows_are_multiplied_before_they_are_gathered(function):
    (x, w), ids = operands((NODES, K), (2 * K, N))
    tables = "60" if function is in_batches else "60 and 60"
    for step in (squares(function), function):
        # What stays a product over the edges may itself be exchanged, which has no details to tell.
        (detail,) = filter(None, details("matmul", step, x, w, *ids))
        assert detail == f"{EDGES} rows multiplied before they are gathered: {tables}"
    if function is not with_edges:
        assert EDGES not in multiplied_rows(squares(function), x, w, *ids)


@pytest.mark.parametrize("function", WRITINGS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_as_exact_as_stocks(function):
    (x, w), ids = operands((NODES, K), (2 * K, N))

    def step(x, w):
        return squares(function)(x, w, *ids)

    assert_exact(step, x, w)


def test_layers_in_a_rematerialised_loop():
    (x, w), ids = operands((NODES, K), (3, 2 * K, K))

    def step(x, w):
        def layer(x, w):
            return x + jax.ops.segment_sum(pair(x, w, *ids), ids[1], NODES) / EDGES, None

        return jax.value_and_grad(lambda x, w: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0]), (0, 1))(x, w)

    assert len(details("matmul", step, x, w)) == 1
    assert_exact(step, x, w)


def test_a_table_with_two_leading_dimensions():
    (x, w), ids = operands((6, 10, K), (K, N))

    def step(x, w):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(x[ids[0] // 10, ids[1] % 10] @ w)), (0, 1))(x, w)

    assert details("matmul", step, x, w)[0] == f"{EDGES} rows multiplied before they are gathered: 60"
    assert_exact(step, x, w)


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds", "zero"])
def test_rows_that_are_not_there(mode):
    (x, w), (ids, _) = operands((NODES, K), (K, N))
    ids = ids.at[::7].set(NODES + 3).at[::11].set(-NODES - 5)
    options = {"mode": "fill", "fill_value": 0} if mode == "zero" else {"mode": mode}

    def function(x, w):
        return x.at[ids].get(**options) @ w

    assert len(details("matmul", function, x, w)) == 1
    ours, stock = jaxext.accelerate(function)(x, w), jax.jit(function)(x, w)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=2e-5)
    assert np.isnan(stock).any() == (mode == "fill")


def test_precision_is_kept():
    (x, w), (ids, _) = operands((NODES, K), (K, N))
    text = jaxext.accelerate(lambda x, w: jnp.dot(x[ids], w, precision="highest")).lower(x, w).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert line.count("HIGHEST") == 2 and f"tensor<{NODES}x{K}xf32>" in line


def test_in_float64():
    with jax.enable_x64(True):
        (x, w), ids = operands((NODES, K), (2 * K, N))
        x, w = (jnp.asarray(a, jnp.float64) for a in (x, w))
        assert len(details("matmul", pair, x, w, *ids)) == 1
        np.testing.assert_allclose(jaxext.accelerate(pair)(x, w, *ids), pair(x, w, *ids), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("why", "nodes", "k", "n", "read"),
    [
        ("each row is read about once", 1200, K, N, lambda x, i: x[i]),
        ("few columns to contract", NODES, 8, 32, lambda x, i: x[i]),
        ("many results a column", NODES, 16, 80, lambda x, i: x[i]),
        ("most columns are no table's", NODES, 16, 16, lambda x, i: jnp.concatenate([x[i], jnp.ones((EDGES, 20))], 1)),
        ("a number that the product would change", NODES, K, N, lambda x, i: x.at[i].get(mode="fill", fill_value=1.5)),
        ("parts of rows", NODES, K, N, lambda x, i: jnp.concatenate([x, x], 1)[i, :K]),
        ("sums of bfloat16 would be rounded", NODES, K, N, lambda x, i: x.astype("bfloat16")[i]),
        ("side by side the other way", NODES, K, N, lambda x, i: jnp.concatenate([x[i], x[i]], 0)),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_is_left_to_stock(why, nodes, k, n, read):
    (x,), (ids, _) = operands((nodes, k), nodes=nodes)
    rows = read(x, ids)
    w = jnp.ones((rows.shape[-1], n), rows.dtype)
    found = details("matmul", lambda x, w, ids: read(x, ids) @ w, x, w, ids)
    assert [detail for detail in found if "gathered" in detail] == []


def test_switched_off_by_name():
    (x, w), ids = operands((NODES, K), (2 * K, N))
    text = jaxext.accelerate(pair, exclude="matmul").lower(x, w, *ids).as_text()
    assert f"tensor<{EDGES}x{2 * K}xf32>, tensor<{2 * K}x{N}xf32>" in text
