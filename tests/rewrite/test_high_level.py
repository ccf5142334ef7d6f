"""Functions with high-level operations (from JAX 0.12 on `searchsorted`, `nonzero` and their kin) are exchanged too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import arrays, assert_same, needs_kernels
from jax.experimental import hijax

import jaxext

pytestmark = needs_kernels

(X,) = arrays((512, 256))
TABLE = jnp.sort(arrays((300,))[0])

SEARCHES = {
    "searchsorted": lambda table, v: jnp.searchsorted(table, v),
    "by sort": lambda table, v: jnp.searchsorted(table, v, method="sort"),
    "digitize": lambda table, v: jnp.digitize(v, table),
    "interp": lambda table, v: jnp.interp(v, table, jnp.cos(table)),
    "quantile": lambda table, v: v + jnp.quantile(table, 0.3),
    "histogram": lambda table, v: jnp.histogram(v, bins=table)[0].sum() + v,
    "nonzero": lambda table, v: jnp.nonzero(v > 0, size=v.shape[0])[0],
    "ldexp": lambda table, v: jnp.ldexp(v, jnp.arange(v.shape[0]) % 5),
}


def normalised(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)


def with_search(search):
    """A hot path, a layer norm and a sort of its rows, whose first column is looked up."""

    def step(table, x):
        ordered = jnp.sort(normalised(x), -1)
        return ordered.sum(-1), search(table, x[:, 0])

    return step


def kernels(function, *args):
    return jaxext.explain(function)(*args).kernels()


@pytest.mark.parametrize("name", SEARCHES)
def test_what_stands_beside_it_keeps_its_exchanges(name):
    step = with_search(SEARCHES[name])
    assert {"layer_norm", "sort"} <= kernels(step, TABLE, X)
    text = jaxext.accelerate(step).lower(TABLE, X).as_text()
    assert "@jaxext_layer_norm" in text and "@jaxext_sort(" in text
    ours, stock = jaxext.accelerate(step)(TABLE, X), jax.jit(step)(TABLE, X)
    np.testing.assert_allclose(ours[0], stock[0], atol=1e-4)
    assert_same(ours[1], stock[1])


@pytest.mark.parametrize("wrap", ["scan", "vmap", "cond", "remat", "jit"])
def test_so_do_functions_inside_operations(wrap):
    step = with_search(SEARCHES["digitize"])

    def inside(table, xs):
        match wrap:
            case "scan":
                return jax.lax.scan(lambda table, x: (table, step(table, x)), table, xs)[1]
            case "vmap":
                return jax.vmap(step, (None, 0))(table, xs)
            case "cond":
                return jax.lax.cond(table[0] < 0, step, lambda table, x: step(table, 1 - x), table, xs[0])
            case "remat":
                return jax.checkpoint(step)(table, xs[0])
            case _:
                return jax.jit(step)(table, xs[0])

    xs = jnp.stack([X, 2 * X])
    assert {"layer_norm", "sort"} <= kernels(inside, TABLE, xs)
    ours, stock = jaxext.accelerate(inside)(TABLE, xs), jax.jit(inside)(TABLE, xs)
    np.testing.assert_allclose(ours[0], stock[0], atol=1e-4)
    assert_same(ours[1], stock[1])


@pytest.mark.parametrize("outer", [lambda f: f, lambda f: jax.jit(f)])
def test_gradients_through_interp_are_stocks_and_the_hot_path_is_exchanged_under_them(outer):
    def loss(table, x):
        return (normalised(x) * jnp.interp(x, table, jnp.sin(table))).sum()

    gradient = outer(jax.grad(loss, (0, 1)))
    assert "layer_norm" in kernels(gradient, TABLE, X)
    ours, stock = jaxext.accelerate(gradient)(TABLE, X), jax.jit(gradient)(TABLE, X)
    for mine, theirs in zip(ours, stock, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_pytrees_static_and_donated_arguments_and_side_effects_stay():
    seen = []

    def step(state, side, *, scale):
        places = jnp.searchsorted(state["table"], state["x"][:, 0], side=side)
        jax.debug.callback(lambda x: seen.append(x.sum()), places)
        return {"table": state["table"], "x": scale * normalised(state["x"]), "places": places}

    options = {"static_argnums": 1, "donate_argnums": 0, "static_argnames": "scale"}
    ours, stock = jaxext.accelerate(step, **options), jax.jit(step, **options)
    state = lambda: jax.tree.map(jnp.copy, {"table": TABLE, "x": X})  # noqa: E731
    assert "@jaxext_layer_norm" in ours.lower(state(), "right", scale=2.0).as_text()
    assert jax.tree.map(str, ours.eval_shape(state(), "left", scale=2.0)) == jax.tree.map(
        str, stock.eval_shape(state(), "left", scale=2.0)
    )
    for side in ("left", "right"):
        given = state()
        mine, theirs = ours(given, side, scale=2.0), stock(state(), side, scale=2.0)
        assert given["x"].is_deleted()
        np.testing.assert_allclose(mine.pop("x"), theirs.pop("x"), atol=1e-4)
        assert_same(mine, theirs)
    jax.effects_barrier()
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_a_function_over_a_mutable_array_is_exchanged_and_still_writes_it():
    counter = jax.new_ref(jnp.zeros(()))

    def step(table, x):
        counter[...] += 1
        return with_search(SEARCHES["searchsorted"])(table, x)

    assert {"layer_norm", "sort"} <= kernels(step, TABLE, X)
    ours, stock = jaxext.accelerate(step)(TABLE, X), jax.jit(step)(TABLE, X)
    assert_same(ours[1], stock[1])
    assert counter[...] == 2


@pytest.mark.skipif(not hasattr(hijax, "HiPrim"), reason="before JAX 0.12 a user's high-level types are others")
class TestHighLevelTypes:
    @pytest.fixture
    def pair(self):
        """A user's type of two arrays, and a function of it."""

        @dataclasses.dataclass(frozen=True)
        class PairType(hijax.HiType):
            shape: tuple[int, ...]

            def lo_ty(self):
                return [jax.core.ShapedArray(self.shape, jnp.float32)] * 2

            def lower_val(self, pair):
                return [pair.first, pair.second]

            def raise_val(self, first, second):
                return Pair(first, second)

        @dataclasses.dataclass(frozen=True, eq=False)
        class Pair:
            first: jax.Array
            second: jax.Array

        hijax.register_hitype(Pair, lambda pair: PairType(pair.first.shape))

        class Product(hijax.HiPrim):
            def __init__(self, of):
                self.in_avals, self.out_aval = (of,), jax.core.ShapedArray(of.shape, jnp.float32)
                self.params = {}
                super().__init__()

            def expand(self, pair):
                return pair.first * pair.second

        return Pair, lambda pair: Product(jax.typeof(pair))(pair)

    def test_a_function_of_them_stays_with_stock_and_the_report_says_why(self, pair):
        make, product = pair
        step = lambda pair: jnp.sort(normalised(product(pair)), -1)  # noqa: E731
        given = make(X, X + 1)
        with jaxext.collect() as report:
            ours = jaxext.accelerate(step)(given)
        assert report.notes == [
            "<lambda> is left to stock JAX but for what it differentiates: "
            "an argument or a result of it is of a high-level type"
        ]
        assert_same(ours, jax.jit(step)(given))

    def test_an_operation_that_cannot_be_lowered_fails_where_it_fails_on_stock(self):
        class Unfinished(hijax.HiPrim):
            def __init__(self, of):
                self.in_avals, self.out_aval, self.params = (of,), of, {}
                super().__init__()

            def expand(self, x):
                raise NotImplementedError("unfinished")

        step = lambda x: jnp.sort(Unfinished(jax.typeof(x))(x), -1)  # noqa: E731
        with jaxext.collect() as report:
            assert jaxext.accelerate(step).eval_shape(X).shape == X.shape
        assert report.notes == [
            "<lambda> is left to stock JAX but for what it differentiates: "
            "one of its high-level operations cannot be lowered (NotImplementedError: unfinished)"
        ]
        with pytest.raises(NotImplementedError, match="unfinished"):
            jaxext.accelerate(step)(X)
