"""`jnp.searchsorted` on its kernel: stock JAX's places, whatever the array holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import assert_exchanged, bits, calls, details, needs_kernels

import jaxext
from jaxext.kernels._searchsorted import SEARCHSORTED

pytestmark = needs_kernels


def draw(kind, size, dtype="float32"):
    rng = np.random.default_rng(0)
    if kind == "equal ones":
        return rng.integers(-3, 3, size).astype(dtype)
    x = 1e3 * rng.standard_normal(size)
    if kind == "special":
        x = np.where(rng.random(size) < 0.5, rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40], size), x)
    return x.astype(dtype)


def search(side):
    return lambda a, v: jnp.searchsorted(a, v, side=side)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["apart", "equal ones"])
@pytest.mark.parametrize(("n", "shape"), [(1, (300,)), (2, (300,)), (255, (9000,)), (70001, (9001,)), (40, (3, 400))])
def test_places_are_stocks(n, shape, kind, side, dtype):
    a, v = np.sort(draw(kind, n, dtype)), draw(kind, shape, dtype)
    assert_exchanged("searchsorted", search(side), a, v)
    assert_exchanged("searchsorted", search(side), a, np.sort(v))


@pytest.mark.parametrize("side", ["left", "right"])
def test_nans_infinities_denormals_and_zeros_of_both_signs_have_stocks_places(side):
    a, v = np.sort(draw("special", 4000)), draw("special", 9000)
    assert_exchanged("searchsorted", search(side), a, v)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n", [7, 1000, 40000])
def test_an_array_that_is_not_sorted_gives_stocks_places_too(n, side):
    assert_exchanged("searchsorted", search(side), draw("special", n), draw("apart", 6000))


def test_what_is_built_on_it_is_exchanged_and_differentiated_as_on_stock():
    a, v = jnp.sort(draw("apart", 500)), jnp.asarray(draw("apart", (30, 40)))
    # Its array may rise or fall.
    assert_exchanged("searchsorted", lambda a, v: jnp.digitize(v, a), a, v, times=2)
    interpolate = lambda a, v: jnp.sin(jnp.interp(v, a, a * 2)).sum()  # noqa: E731
    assert calls("searchsorted", interpolate, a, v) == 1
    ours, stock = (f(jax.grad(interpolate, 1))(a, v) for f in (jaxext.accelerate, jax.jit))
    np.testing.assert_array_equal(bits(ours), bits(stock))


def test_the_report_names_it_and_sort_switches_it_off():
    a, v = jnp.sort(draw("apart", 500)), draw("apart", 4000)
    assert details("sort", search("left"), a, v) == [""]
    without = jaxext.accelerate(search("left"), exclude=("sort",))
    assert "jaxext_searchsorted" not in jax.jit(without).lower(a, v).as_text()


def test_what_the_kernel_does_not_take_stays_with_stock():
    a, v = jnp.sort(draw("apart", 500)), jnp.asarray(draw("apart", 4000))
    assert calls("searchsorted", search("left"), a.astype(jnp.bfloat16), v.astype(jnp.bfloat16)) == 0
    assert calls("searchsorted", search("left"), a, v[:9]) == 0
    assert calls("searchsorted", lambda a, v: jnp.searchsorted(a, v, method="sort"), a, v) == 0
    assert calls("searchsorted", jax.vmap(search("left")), jnp.stack([a, a]), jnp.stack([v, v])) == 0


def test_a_function_of_the_users_own_with_that_name_is_left_alone():
    @jax.jit
    def searchsorted(a, v):
        return (v[:, None] > a).sum(1) + 1

    a, v = jnp.sort(draw("apart", 50)), draw("apart", 4000)
    assert calls("searchsorted", lambda a, v: searchsorted(a, v), a, v) == 0


def test_an_empty_array_is_refused_with_a_reason():
    assert SEARCHSORTED.refusal(jnp.zeros(0), jnp.zeros(5), side="left") == (
        "'array' has 0 elements; the kernel takes 1 to 2**31 - 2"
    )
