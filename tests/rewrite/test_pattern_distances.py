"""Products with terms of rows and of columns: one longer product on one CPU device, as exact as stock, else stock's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import arrays, assert_exact, details
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxext

M, N, K = 300, 200, 12


def sums(x):
    return jnp.sum(x * x, axis=1)


def with_broadcasts(x, y):
    return sums(x)[:, None] - 2 * x @ y.T + sums(y)


def written_otherwise(x, y):
    return sums(y)[None, :] + (sums(x)[:, None] - jnp.dot(x, y.T) * 2)


def negated(x, y):
    return -(sums(x)[:, None] + sums(y)[None] - 2.0 * jnp.einsum("ik,jk->ij", x, y))


def expanded(x, y):
    squares = jnp.broadcast_to(sums(x)[:, None], (M, N)) + jnp.broadcast_to(sums(y)[None, :], (M, N))
    return squares + (x @ y.T) * -2.0


def scaled(x, y):
    return -0.1 * (sums(x)[:, None] + sums(y)[None] - 2 * jnp.tensordot(x.T, y, ((0,), (1,))))


WRITINGS = [with_broadcasts, written_otherwise, negated, expanded, scaled]


def found(function, *args):
    return [detail for detail in details("matmul", function, *args) if "contracted" in detail]


def lines(function, *args):
    text = jaxext.accelerate(function).lower(*args).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("function", WRITINGS, ids=lambda f: f.__name__)
def test_one_longer_product(function):
    x, y = arrays((M, K), (N, K))
    assert found(function, x, y) == [f"terms of rows and columns as {K} + 2 contracted, for {M}x{N}"]
    (line,) = lines(function, x, y)
    assert f"tensor<{M}x{K + 2}xf32>" in line
    assert_exact(function, x, y)


@pytest.mark.parametrize("offset", [0.0, 30.0, 3000.0])
def test_points_far_from_the_origin_are_as_exact_as_stocks(offset):
    x, y = arrays((M, K), (N, K))
    assert_exact(with_broadcasts, x + offset, y + offset)


def test_points_that_are_equal():
    x, _ = arrays((M, K), (N, K))
    assert_exact(with_broadcasts, x, x)


def test_infinite_points_give_what_stock_gives():
    x, y = arrays((M, K), (N, K))
    x, y = x.at[3, 5].set(jnp.inf).at[7, 0].set(jnp.nan), y.at[11, 2].set(-jnp.inf)
    ours, stock = jaxext.accelerate(with_broadcasts)(x, y), jax.jit(with_broadcasts)(x, y)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(stock))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(stock))


def test_differentiated_it_is_stocks():
    x, y = arrays((M, K), (N, K))

    def gradients(x, y):
        return jax.grad(lambda x, y: jnp.sum(jnp.sin(with_broadcasts(x, y))), argnums=(0, 1))(x, y)

    assert not any(f"x{K + 2}xf32" in line for line in lines(gradients, x, y))
    assert_exact(gradients, x, y)


def test_mapped_and_in_loops():
    x, y = arrays((3, M, K), (N, K))
    assert_exact(jax.vmap(with_broadcasts, in_axes=(0, None)), x, y)

    def loop(x, y):
        return jax.lax.scan(lambda total, x: (total + jnp.min(with_broadcasts(x, y)), None), 0.0, x)[0]

    assert len(found(loop, x, y)) == 1
    assert_exact(loop, x, y)
    assert_exact(lambda x, y: jax.vmap(jaxext.accelerate(with_broadcasts), in_axes=(0, None))(x, y), x, y)


def test_several_devices_run_what_was_written():
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    x, y = arrays((M, K), (N, K))
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    (line,) = lines(with_broadcasts, spread, y)
    assert f"x{K + 2}xf32" not in line
    np.testing.assert_allclose(jaxext.accelerate(with_broadcasts)(spread, y), with_broadcasts(x, y), atol=1e-4)


@pytest.mark.parametrize(
    ("why", "function", "shapes"),
    [
        ("a bias alone", lambda x, y: x @ y.T + sums(y), ((M, K), (N, K))),
        ("a term for all", lambda x, y: with_broadcasts(x, y) + x[0, 0], ((M, K), (N, K))),
        ("a matrix is added", lambda x, y: with_broadcasts(x, y) + jnp.outer(x[:, 0], y[:, 0]), ((M, K), (N, K))),
        ("terms cost nothing", lambda x, y: jnp.exp(with_broadcasts(x, y)), ((M, K), (N, K))),
        ("the product is needed too", lambda x, y: (p := x @ y.T, sums(x)[:, None] - p + sums(y)), ((M, K), (N, K))),
        ("much to contract", with_broadcasts, ((M, 80), (N, 80))),
        ("few results", with_broadcasts, ((M, K), (4, K))),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else None,
)
def test_what_is_left_to_stock(why, function, shapes):
    x, y = arrays(*shapes)
    assert found(function, x, y) == []
    assert not any(f"x{x.shape[1] + 2}xf32" in line for line in lines(function, x, y))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_are_left(dtype):
    x, y = arrays((M, K), (N, K), dtype=dtype)
    assert found(with_broadcasts, x, y) == []
