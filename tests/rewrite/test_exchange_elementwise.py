"""Chains of bfloat16 arithmetic are rounded once, and nothing that anybody can see is rounded less than it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import arrays, assert_exact, assert_same, details
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxext
from jaxext.rewrite import unrounded

SHAPE = (128, 160)  # more than LEAST_ELEMENTS


def operands(count=2, dtype="bfloat16"):
    return arrays(*[SHAPE] * count, dtype=dtype)


def elementwise(function, *args):
    return details("elementwise", function, *args)


def with_gradients(function):
    def run(g, *args):
        result, pull = jax.vjp(function, *args)
        return result, pull(g)

    return run


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x),
    "gelu, erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": lambda x: jax.nn.silu(x),
    "swiglu": lambda x, y: jax.nn.silu(x) * y,
    "geglu": lambda x, y: jax.nn.gelu(x) * y,
    "sigmoid": lambda x: jax.nn.sigmoid(x),
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "squared relu": lambda x: jnp.square(jnp.maximum(x, 0)) * 0.5,
    "select": lambda x, y: jnp.where(x > y, jnp.exp(x) * y, -y * x) + 1,
    "power": lambda x: jnp.sqrt(jnp.abs(x) + 1) * jnp.abs(x) ** 1.5 - x**3,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_as_exact_as_stock(name):
    function = ACTIVATIONS[name]
    g, *xs = operands(1 + function.__code__.co_argcount)
    assert elementwise(with_gradients(function), g, *xs)
    assert_exact(with_gradients(function), g, *xs)


def test_a_chain_is_more_exact_than_stock():
    (x,) = operands(1)

    def error(result):
        exact = jax.nn.silu(np.float32(x))
        return np.abs(np.float32(result) - exact).max()

    assert error(jaxext.accelerate(lambda x: jax.nn.silu(x))(x)) < error(jax.jit(jax.nn.silu)(x))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_left_alone(dtype):
    assert not elementwise(jax.nn.gelu, *operands(1, dtype))


def test_small_arrays_and_short_chains_are_left_alone():
    x, y = operands()
    assert not elementwise(jax.nn.gelu, x[:4])
    assert not elementwise(lambda x, y: x * y + 1, x, y)
    assert elementwise(lambda x, y: x * y + 1 - x, x, y) == ["3 operations, rounded once"]


SEEN = {
    "a result": lambda x, y: (lambda s: (s, (s - x) * 3 + y))(x + y),
    "an argument of two chains": lambda x, y: (lambda s: (jnp.sum(s * 3 + y), jnp.flip(s - x)))(x + y),
    "a comparison": lambda x, y: (lambda s: s > x * 1.01)(x + y),
    "a cast": lambda x, y: (x + y).astype(jnp.float32) - x.astype(jnp.float32),
    "an explicit rounding": lambda x, y: lax.reduce_precision(x + y, 8, 4) - x,
    "the low half of a float32": lambda x, y: (lambda w: w - w.astype(jnp.bfloat16).astype(jnp.float32))(
        x.astype(jnp.float32) * 1.001
    ),
    "a compensated sum": lambda x, y: (lambda s: (s, y - (s - x)))(x + y),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_anybody_sees_has_the_bits_of_stock(name):
    function, args = SEEN[name], operands()
    # The first of a program's values that is seen was rounded in stock as well.
    first = lambda result: jax.tree.leaves(result)[:1]  # noqa: E731
    assert_same(first(jaxext.accelerate(function)(*args)), first(jax.jit(function)(*args)))


def test_a_compensated_sum_still_compensates():
    x, y = operands()
    function = SEEN["a compensated sum"]
    assert_same(jaxext.accelerate(function)(x, y), jax.jit(function)(x, y))


INSIDE = {
    "scan": lambda x: lax.scan(lambda c, _: (jax.nn.gelu(c), None), x, None, length=2)[0],
    "cond": lambda x: lax.cond(jnp.sum(x) > 0, jax.nn.gelu, jax.nn.silu, x),
    "remat": lambda x: jax.grad(lambda x: jnp.sum(jax.checkpoint(jax.nn.gelu)(x).astype(jnp.float32)))(x),
    "vmap": jax.vmap(jax.nn.gelu),
    "called twice": lambda x: jax.nn.silu(jnp.flip(jax.nn.silu(x))),
    "a result that nobody reads": lambda x: jax.jit(lambda x: (jax.nn.silu(x), jnp.exp(x) * x - 1))(x)[0],
    "a result that is an argument": lambda x: jax.jit(lambda x: (jax.nn.silu(x), x))(x),
}


@pytest.mark.parametrize("name", INSIDE)
def test_chains_are_found_inside(name):
    (x,) = operands(1)
    assert elementwise(INSIDE[name], x)
    assert_exact(INSIDE[name], x)


def test_a_scope_that_excludes_them_is_left_alone():
    (x,) = operands(1)
    assert not elementwise(lambda x: jaxext.accelerate(jax.nn.gelu, exclude="elementwise")(x), x)
    with jaxext.disabled():
        assert_same(jaxext.accelerate(jax.nn.gelu)(x), jax.jit(jax.nn.gelu)(x))


def test_where_xla_may_not_leave_out_roundings_none_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_allow_excess_precision=false")
    assert not elementwise(lambda x: jax.nn.gelu(x), *operands(1))


def test_a_program_that_spans_devices_keeps_its_roundings():
    g, x, y = operands(3)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put((g, x, y), jax.NamedSharding(mesh, jax.P("data")))
    function = with_gradients(ACTIVATIONS["swiglu"])
    assert_same(jaxext.accelerate(function)(*spread), jax.jit(function)(*spread))


EXACT = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: -a,
    lambda a, b: jnp.maximum(a, b),
    lambda a, b: jnp.minimum(a, 2 * b),
    lambda a, b: jnp.abs(a),
    lambda a, b: jnp.where(a > b, a, b),
    lambda a, b: jax.jit(lambda a, b: (a - b, a + 1 - b))(a, b)[0],
    lambda a, b: jnp.flip(a, 0),
)
STEPS = st.lists(st.tuples(st.integers(0, len(EXACT) - 1), st.integers(0, 30), st.integers(0, 30)), max_size=6)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(steps=STEPS, seen=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_any_graph_of_exact_operations_has_the_bits_of_stock(steps, seen):
    """Whole numbers up to 256, of which bfloat16 rounds none: whatever is combined, the graph has to be the same."""

    def function(x, y):
        values = [x, y]
        for which, a, b in steps:
            values.append(EXACT[which](values[a % len(values)], values[b % len(values)]))
        return [values[number % len(values)] for number in seen]

    xs = [jnp.asarray(np.random.default_rng(n).integers(-2, 3, SHAPE), jnp.bfloat16) for n in range(2)]
    assert_same(jaxext.accelerate(function)(*xs), jax.jit(function)(*xs))


def test_chains_are_named_after_the_line_that_calls():
    (x,) = operands(1)

    def program(x):
        return jax.nn.silu(x) * 2

    (entry,) = jaxext.explain(program)(x).to_dict()["replaced"]
    assert entry["kernel"] == unrounded.KERNEL and "test_exchange_elementwise.py" in entry["source"]
