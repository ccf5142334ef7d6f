"""What every op promises, checked for each of its argument specs: one suite, no op named in it."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.kernels import OPS
from jaxext.kernels._op import native_status

CASES = [
    pytest.param(op, spec, dtype, id=f"{op.name}-{spec.name}-{dtype}")
    for op in OPS
    for spec in op.specs
    for dtype in spec.dtypes
]
SMALL = [next(c for c in CASES if c.values[0] is op) for op in OPS if op.specs]


def operands_of(spec, dtype):
    return [jnp.asarray(x) for x in spec.make(np.random.default_rng(7), jnp.dtype(dtype))]


def seen(call, op, spec):
    """The outputs that a user can see: the differentiable ones; the rest are residuals."""

    def fn(*xs):
        outs = call(*xs, **spec.params)
        return [outs[i] for i in op.outputs]

    return fn


def run(op, spec):
    return seen(op, op, spec)


def reference(op, spec):
    return seen(op.reference, op, spec)


def widened(xs):
    return [np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in xs]


def oracle(fn, xs):
    with jax.enable_x64(True):
        return [np.asarray(y) for y in jax.jit(fn)(*map(jnp.asarray, widened(xs)))]


def assert_as_good_as_reference(native, stock, exact, roundings=4, sums=0.0):
    """Error against float64: at most twice the reference's in that dtype, plus `roundings` of the largest value.

    `sums`: what a long sum, added in another order than the reference's, may differ by.

    Integers are the reference's own.
    """
    for i, (n, s, e) in enumerate(zip(native, stock, exact)):
        assert n.shape == s.shape and n.dtype == s.dtype
        if not n.size:
            continue
        if not jnp.issubdtype(n.dtype, jnp.floating):
            np.testing.assert_array_equal(n, s, err_msg=f"output {i}")
            continue
        n64, s64 = np.asarray(n, np.float64), np.asarray(s, np.float64)
        np.testing.assert_array_equal(np.isfinite(n64), np.isfinite(s64), err_msg=f"output {i}")
        ok = np.isfinite(e) & np.isfinite(s64)
        if not ok.any():
            continue
        floor = roundings * float(jnp.finfo(n.dtype).eps) * np.abs(e[ok]).max() + sums + 1e-30
        error, allowed = np.abs(n64 - e)[ok].max(), 2 * np.abs(s64 - e)[ok].max() + floor
        assert error <= allowed, f"output {i}: error {error:.3e}, allowed {allowed:.3e}"


def float_indices(xs):
    return tuple(i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.floating))


def vjp_of(fn, xs, wrt, seed=3):
    """Gradients of `fn` for fixed random cotangents, as a function of all operands."""
    shapes = jax.eval_shape(fn, *xs)
    rng = np.random.default_rng(seed)
    cotangents = [rng.standard_normal(s.shape) for s in shapes]

    def gradients(*ys):
        def moving(*zs):
            full = list(ys)
            for i, z in zip(wrt, zs):
                full[i] = z
            return fn(*full)

        outs, pull = jax.vjp(moving, *(ys[i] for i in wrt))
        return list(pull([jnp.asarray(c, o.dtype) for c, o in zip(cotangents, outs)]))

    return gradients


@pytest.mark.parametrize(("op", "spec", "dtype"), CASES)
def test_forward_is_as_exact_as_the_reference(op, spec, dtype):
    xs = operands_of(spec, dtype)
    native = jax.jit(run(op, spec))(*xs)
    assert_as_good_as_reference(native, jax.jit(reference(op, spec))(*xs), oracle(reference(op, spec), xs))


@pytest.mark.parametrize(("op", "spec", "dtype"), [c for c in CASES if c.values[0].backward is not None])
def test_gradients_are_as_exact_as_the_reference(op, spec, dtype):
    xs = operands_of(spec, dtype)
    wrt = float_indices(xs)
    native, stock = (vjp_of(f, xs, wrt) for f in (run(op, spec), reference(op, spec)))
    assert_as_good_as_reference(jax.jit(native)(*xs), jax.jit(stock)(*xs), oracle(stock, xs))


@pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())
@pytest.mark.parametrize(("op", "spec", "dtype"), CASES)
def test_the_lowered_program_calls_the_kernel(op, spec, dtype):
    xs = operands_of(spec, dtype)
    avals = [jax.typeof(x) for x in xs]
    if reason := op.refusal(*avals, **spec.params):
        pytest.skip(f"runs the reference: {reason}")
    assert jax.jit(run(op, spec)).lower(*xs).as_text().count(f"@{op.target}(") == 1
    if op.backward is not None:
        text = jax.jit(vjp_of(run(op, spec), xs, float_indices(xs))).lower(*xs).as_text()
        assert text.count(f"@{op.backward.target}(") == 1


def close(native, stock, dtype):
    for n, s in zip(jax.tree.leaves(native), jax.tree.leaves(stock)):
        n, s = np.asarray(n, np.float64), np.asarray(s, np.float64)
        scale = np.nanmax(np.abs(np.where(np.isfinite(s), s, 0)), initial=0)
        np.testing.assert_allclose(n, s, rtol=0, atol=64 * float(jnp.finfo(dtype).eps) * scale + 1e-6)


TRANSFORMS = {
    "eager": lambda f: f,
    "vmap": lambda f: lambda *xs: jax.vmap(f)(*(jnp.stack([x, x]) for x in xs)),
    "vmap of the first operand": lambda f: (
        lambda *xs: jax.vmap(f, (1, *[None] * (len(xs) - 1)), 1)(jnp.stack([xs[0], -xs[0]], 1), *xs[1:])
    ),
    "vmap twice": lambda f: lambda *xs: jax.vmap(jax.vmap(f))(*(jnp.stack([x, x])[None] for x in xs)),
    "remat": jax.checkpoint,
    "scan": lambda f: lambda *xs: jax.lax.scan(lambda c, _: (c, f(*xs)), 0, None, length=2)[1],
    "cond": lambda f: lambda *xs: jax.lax.cond(jnp.sum(xs[0]) == jnp.sum(xs[0]), f, f, *xs),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("op", "spec", "dtype"), SMALL)
def test_transformations_agree_with_the_reference(op, spec, dtype, transform):
    xs = operands_of(spec, dtype)
    wrap = TRANSFORMS[transform]
    close(wrap(run(op, spec))(*xs), wrap(reference(op, spec))(*xs), dtype)
    wrt = float_indices(xs)
    if op.backward is not None:
        native, stock = (vjp_of(f, xs, wrt) for f in (run(op, spec), reference(op, spec)))
        close(wrap(native)(*xs), wrap(stock)(*xs), dtype)


@pytest.mark.parametrize(("op", "spec", "dtype"), [c for c in SMALL if c.values[0].backward is not None])
def test_gradients_pass_through_transformations_of_the_forward(op, spec, dtype):
    xs = operands_of(spec, dtype)
    wrt = float_indices(xs)
    for name in ("vmap", "remat", "scan", "cond"):
        wrap = TRANSFORMS[name]
        native, stock = (vjp_of(wrap(f), xs, wrt) for f in (run(op, spec), reference(op, spec)))
        close(jax.jit(native)(*xs), jax.jit(stock)(*xs), dtype)


@pytest.mark.parametrize(("op", "spec", "dtype"), [c for c in SMALL if c.values[0].backward is not None])
def test_forward_mode_and_second_derivatives_agree_with_the_reference(op, spec, dtype):
    xs = operands_of(spec, "float32")
    wrt = float_indices(xs)
    tangents = [jnp.ones_like(xs[i]) * 0.1 for i in wrt]

    def along(fn):
        def moving(*zs):
            full = list(xs)
            for i, z in zip(wrt, zs):
                full[i] = z
            return fn(*full)

        scalar = lambda *zs: sum(jnp.sum(jnp.sin(y)) for y in moving(*zs))  # noqa: E731
        moved = tuple(xs[i] for i in wrt)
        first = jax.jvp(moving, moved, tuple(tangents))[1]
        second = jax.jvp(jax.grad(scalar, tuple(range(len(wrt)))), moved, tuple(tangents))[1]
        return first, second

    native, stock = along(run(op, spec)), along(reference(op, spec))
    close(native[0], stock[0], "float32")
    for n, s in zip(native[1], stock[1]):
        np.testing.assert_allclose(n, s, rtol=0, atol=1e-3 * np.abs(s).max() + 1e-5)


@pytest.mark.parametrize(("op", "spec", "dtype"), SMALL)
def test_a_batch_over_two_devices_is_not_gathered(op, spec, dtype):
    xs = operands_of(spec, dtype)
    roles = op.roles(len(xs), **spec.params)
    xs = [jnp.stack([x, x]) if r == "full" else x[None] if r == "broadcast" else x for x, r in zip(xs, roles)]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = [jax.P("data") if r == "full" else jax.P() for r in roles]
    sharded = [jax.device_put(x, jax.NamedSharding(mesh, p)) for x, p in zip(xs, place)]
    functions = [run(op, spec)]
    if op.backward is not None:
        functions.append(vjp_of(run(op, spec), xs, float_indices(xs)))
    for fn in functions:
        text = jax.jit(fn).lower(*sharded).compile().as_text()
        assert "all-gather" not in text
        close(jax.jit(fn)(*sharded), jax.jit(fn)(*xs), dtype)


@functools.cache
def slower_instruction_sets():
    from jaxext import _native

    compiled = _native.compiled_isas()
    return compiled[: compiled.index(_native.active_isa())] if not native_status() else []


@pytest.mark.parametrize("isa", ["v2", "v3", "v4"])
def test_every_instruction_set_conforms(isa, tmp_path_factory):
    if isa not in slower_instruction_sets():
        pytest.skip(f"{isa} is not a lower instruction set on this machine")
    only = "forward_is_as_exact or gradients_are_as_exact"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", only, "-p", "no:cacheprovider"]
    # What XLA compiles is the same for all of them: kernels are called by name. Only the first has to wait for it.
    session = tmp_path_factory.getbasetemp()
    shared = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(shared / "conformance"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(command, env={**os.environ, **compiled, "JAXEXT_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())
def test_compiled_targets_and_ops_are_the_same_set():
    from jaxext import _native

    backwards = [op.backward for op in OPS if op.backward is not None]
    assert set(_native.targets()) == {op.target for op in (*OPS, *backwards)}
