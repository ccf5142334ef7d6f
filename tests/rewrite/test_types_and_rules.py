"""What a program says about its derivatives and its arrays' types holds with kernels in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, normals, report_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxext
from jaxext import kernels

B, H, T, D = 2, 2, 8, 16


def qkv():
    return normals(0, *[(B, H, T, D)] * 3)


def attend(q, k, v, softmax=jax.nn.softmax, scores=lambda s: s):
    return jnp.einsum("bhqk,bhkd->bhqd", softmax(scores(jnp.einsum("bhqd,bhkd->bhqk", q, k))), v)


@jax.custom_jvp
def reversed_gradient(x):
    return x * 1.0


reversed_gradient.defjvp(lambda primals, tangents: (reversed_gradient(*primals), -tangents[0]))


@jax.custom_jvp
def tripled_softmax(x):
    return jax.nn.softmax(x)


tripled_softmax.defjvp(lambda primals, tangents: (tripled_softmax(*primals), 3 * tangents[0]))

USERS_RULES = {
    "on the query": lambda q, k, v: attend(reversed_gradient(q), k, v),
    "on the scores": lambda q, k, v: attend(q, k, v, scores=reversed_gradient),
    "of the softmax": lambda q, k, v: attend(q, k, v, softmax=tripled_softmax),
    "in a norm": lambda q, k, v: q * jax.lax.rsqrt(jnp.mean(reversed_gradient(q) ** 2, -1, keepdims=True) + 1e-6),
}


@pytest.mark.parametrize("place", USERS_RULES)
def test_a_users_derivative_inside_a_pattern_is_kept(place):
    assert_agrees(USERS_RULES[place], *qkv())


def test_jaxs_own_softmax_is_looked_into_by_either_spelling():
    with jax.softmax_custom_jvp(True):
        assert report_of(attend, *qkv()).kernels() == {"attention"}
    with jax.softmax_custom_jvp(False):
        assert report_of(attend, *qkv()).kernels() == {"attention"}


@pytest.mark.parametrize(
    ("spec", "kernel"), [(P("a"), True), (P("a", "b"), False), (P(None, None, "b"), False)], ids=str
)
def test_explicit_shardings_stay_as_the_types_say(spec, kernel):
    mesh = jax.make_mesh((2, 1), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    def sharded(q, k, v):
        heads = P(*spec[:2])
        return attend(q, jax.sharding.reshard(k, heads), jax.sharding.reshard(v, heads))

    with jax.set_mesh(mesh):
        q, k, v = (jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in qkv())
        gradient = jax.grad(lambda *xs: jnp.sin(sharded(*xs)).sum(), (0, 1, 2))
        with jaxext.disabled():
            expected = jax.jit(gradient)(q, k, v)
        report = jaxext.explain(gradient)(q, k, v)
        found = jaxext.accelerate(gradient)(q, k, v)
    assert report.kernels() == ({"attention"} if kernel else set())
    if not kernel:
        assert report.fallbacks[0].reason.startswith("its result is f32[2"), str(report)
    for stock, ours in zip(expected, found, strict=True):
        assert stock.sharding == ours.sharding
        np.testing.assert_allclose(ours, stock, rtol=2e-5, atol=2e-5)


def test_a_tangent_that_is_known_needs_no_cotangent():
    q, k, v = qkv()

    def along(tangent):
        return jax.jvp(kernels.attention, (q, k, v), (tangent, jnp.zeros_like(k), jnp.zeros_like(v)))[1]

    (transposed,) = jax.linear_transpose(along, q)(v)
    expected = jax.vjp(lambda q: kernels.attention(q, k, v), q)[1](v)[0]
    np.testing.assert_allclose(transposed, expected, rtol=1e-5, atol=1e-5)


def test_a_checked_function_inside_a_trace_is_checked_at_its_first_call_outside(monkeypatch):
    checked = jaxext.accelerate(lambda x: jnp.sin(x), check=True)
    np.testing.assert_allclose(jax.jit(lambda x: checked(x).sum())(jnp.ones(3)), 3 * np.sin(1.0), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: checked(x))(1.0), np.cos(1.0), rtol=1e-6)
    compared = []
    monkeypatch.setattr("jaxext._check._differences", lambda *args: compared.append(1) or iter(()))
    checked(jnp.ones(3))
    checked(jnp.ones(3))
    assert compared == [1]


def test_a_check_that_failed_is_made_again(monkeypatch):
    checked = jaxext.accelerate(lambda x: jnp.sin(x), check=True)
    monkeypatch.setattr("jaxext._check._differences", lambda *args: iter(["result (by 1, tolerance 0)"]))
    for _ in range(2):
        with pytest.raises(AssertionError, match="results differ from plain JAX in result"):
            checked(jnp.ones(3))
