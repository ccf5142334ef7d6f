"""Every op at sizes next to powers of two, none and one, of every dtype, also with operands stored transposed.

Called without jit where they are not transposed: each operand and result is then an allocation of its own, whose ends
AddressSanitizer watches (`make sanitize`).
"""

import math

import jax
import jax.numpy as jnp
import pytest
import test_attention
from attention_oracle import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conformance import assert_as_good_as_reference, float_indices, operands_of, oracle, reference, run, vjp_of

from jaxext.kernels import (
    _arg_reduce,
    _convolution,
    _cross_entropy,
    _cumulative,
    _depthwise,
    _distinct_rows,
    _dot,
    _group_norm,
    _indexed_rows,
    _linear_recurrence,
    _max_pool,
    _norm,
    _product,
    _random_bits,
    _searchsorted,
    _sort,
    _top_k,
)
from jaxext.kernels._element import ORDERED
from jaxext.kernels._op import native_status

native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())

SIZES = st.sampled_from((1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1023, 1025))
SMALL = st.sampled_from((1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65))
ROWS = st.sampled_from((0, 1, 2, 3, 5))
FLOATS = ("float32", "bfloat16")


def chosen(*values):
    return st.sampled_from(values)


def norms(*extras, residual=()):
    subsets = [(*residual, *extras[:n]) for n in range(len(extras) + 1)]
    return st.builds(
        lambda rows, n, extras, scale: _norm._spec("", (rows, n), extras, scale), ROWS, SIZES, chosen(*subsets),
        chosen(None, "float32"),
    )  # fmt: skip


def group_norms():
    def make(images, pixels, groups, width, n_extras, scale):
        return _group_norm._spec("", (images, pixels, groups * width), groups, ("scale", "bias")[:n_extras], scale)

    return st.builds(make, ROWS, SMALL, chosen(1, 2, 3, 8), SMALL, chosen(0, 1, 2), chosen(None, "float32"))


def labels(rows, n, low, smoothing, out_of_range):
    make = _cross_entropy._logits_and_labels(rows, n, low=-low * n, high=n + low)
    return _cross_entropy._labels_spec("", make, smoothing, out_of_range)


def targets(rows, n):
    return _cross_entropy.ArgSpec("", _cross_entropy._logits_and_targets(rows, n), {"out_dtype": None})


def products(m, k, n, a_turned, b_turned):
    a, b = (k, m) if a_turned else (m, k), (n, k) if b_turned else (k, n)
    return _product._spec("", a, b, a_turned=a_turned, b_turned=b_turned)


def small_products(batch, m, k, n, a_turned, b_turned):
    a, b = (k, m) if a_turned else (m, k), (n, k) if b_turned else (k, n)
    return _product._spec("", (batch, *a), (batch, *b), a_turned=a_turned, b_turned=b_turned)


def dots(batch, m, k, n, out):
    return _dot._spec("", (batch, m, k), (batch, n, k), (((2,), (2,)), ((0,), (0,))), out)


def convolution(gradient, images, size, taps, channels, features, stride, base, low):
    reach = [(n - 1) * base + 1 + 2 * low - k for n, k in zip(size, taps)]
    places = tuple(max(1, n // stride + 1) for n in reach)
    window = _depthwise.Window(places, (stride,) * 2, base=(base,) * 2, low=(low, low))
    (spec, *_) = _convolution._row(gradient, "", (images, *size, channels), taps, features, window)
    return spec


def convolution_specs(gradient):
    sizes, taps = st.tuples(chosen(1, 2, 7, 12), chosen(1, 5, 9)), st.tuples(chosen(1, 2, 3), chosen(1, 2, 4, 7))
    some = (chosen(0, 1, 3, 13), sizes, taps, SMALL, SMALL, chosen(1, 2), chosen(1, 2, 3), chosen(0, 1, 3))
    return st.builds(convolution, st.just(gradient), *some)


def depthwise(gradient, images, size, taps, channels, stride, dilation, low):
    reach = [n + 2 * low - (k - 1) * dilation for n, k in zip(size, taps)]
    places = tuple(max(1, (n - 1) // stride + 1) for n in reach)  # XLA knows no window without any
    window = _depthwise.Window(places, (stride,) * 2, (dilation,) * 2, low=(low, low))
    other = (images, *places, channels) if gradient else (*taps, channels)
    return _depthwise._spec("", (images, *size, channels), window.turned(taps) if gradient else window, other)


def depthwise_specs(gradient):
    side = chosen(1, 2, 7, 16, 33)
    sizes, taps = st.tuples(side, side), st.tuples(chosen(1, 2, 3), chosen(1, 2, 3, 4, 5, 7, 9))
    some = (ROWS, sizes, taps, SMALL, chosen(1, 2), chosen(1, 2), chosen(0, 1, 3))
    return st.builds(depthwise, st.just(gradient), *some)


def taken(rows, n, count, clips):
    fill = None if clips else _indexed_rows.filler("float32", 0)
    return _indexed_rows._spec("", (max(rows, 1), n), (count, 1), {"fill": fill})


def added(rows, n, count, kind, clips):
    return _indexed_rows._spec("", (max(rows, 1), n), (count, 1), {"kind": kind, "clips": clips}, updates=True)


def pooled(back, images, size, window, strides, low, channels):
    padding = tuple((min(low, w - 1),) * 2 for w in window)
    return _max_pool._spec("", (images, *size, channels), window, strides, padding, back=back)


def pool_specs(back):
    side, taps = chosen(1, 2, 7, 16, 33), chosen(1, 2, 3, 5)
    pairs = (st.tuples(side, side), st.tuples(taps, taps), st.tuples(taps, taps))
    return st.builds(pooled, st.just(back), ROWS, *pairs, chosen(0, 1, 2), SMALL)


def axes(make, *options):
    """Specs of ops along an axis: of rows, or of columns with a stride of 1 to 1025 elements."""
    return st.builds(
        lambda rows, n, inner, *rest: make("", (rows, n, inner) if inner else (rows, n), -2 if inner else -1, *rest),
        ROWS, SIZES, st.just(0) | SIZES, *options,
    )  # fmt: skip


FLAG, LEVELS = st.booleans(), chosen(3, 120)
DIFFERENTIABLE = {
    "layer_norm": (_norm.LAYER_NORM, norms("scale", "bias")),
    "rms_norm": (_norm.RMS_NORM, norms("scale")),
    "add_layer_norm": (_norm.ADD_LAYER_NORM, norms("scale", "bias", residual=("residual",))),
    "add_rms_norm": (_norm.ADD_RMS_NORM, norms("scale", residual=("residual",))),
    "group_norm": (_group_norm.GROUP_NORM, group_norms()),
    "linear_recurrence": (
        _linear_recurrence.LINEAR_RECURRENCE,
        st.builds(lambda *shape: _linear_recurrence._spec("", *shape), ROWS, SMALL, SIZES),
    ),
    "cross_entropy": (
        _cross_entropy.LABELS,
        st.builds(labels, ROWS, SIZES, chosen(0, 1), chosen(0.0, 0.1), chosen("nan", "zero")),
    ),
    "target_cross_entropy": (_cross_entropy.TARGETS, st.builds(targets, ROWS, SIZES)),
}
OTHERS = {
    "product": (_product.PRODUCT, FLOATS, st.builds(products, SMALL, SIZES, SIZES, FLAG, FLAG)),
    "small_products": (
        _product.PRODUCT,
        FLOATS,
        st.builds(small_products, ROWS, SMALL, SMALL, SMALL, FLAG, FLAG),
    ),
    "dot": (_dot.DOT, ("bfloat16",), st.builds(dots, ROWS, SMALL, SIZES, SMALL, chosen("float32", "bfloat16"))),
    "cumulative": (_cumulative.CUMULATIVE, FLOATS, axes(_cumulative._spec, chosen(*_cumulative.KINDS), FLAG)),
    "arg_reduce": (_arg_reduce.ARG_REDUCE, ORDERED, axes(_arg_reduce._spec, FLAG, LEVELS)),
    "sort": (
        _sort.SORT,
        ORDERED,
        st.builds(lambda rows, n, *rest: _sort._spec("", (rows, n), *rest), ROWS, SIZES, chosen(0, 1, 3), LEVELS),
    ),
    "searchsorted": (
        _searchsorted.SEARCHSORTED,
        ("float32", "int32"),
        st.builds(
            lambda n, rows, *rest: _searchsorted._spec("", max(n, 1), (rows, 37), *rest), SIZES, ROWS,
            chosen("left", "right"), LEVELS, FLAG,
        ),
    ),
    "top_k": (
        _top_k.TOP_K,
        ORDERED,
        st.builds(
            lambda rows, n, share, levels: _top_k._spec("", (rows, n), int(share * n), levels), ROWS, SIZES,
            chosen(0.0, 0.1, 0.5, 1.0), LEVELS,
        ),
    ),
    "gather": (_indexed_rows.GATHER, FLOATS, st.builds(taken, ROWS, SIZES, chosen(0, 1, 65), FLAG)),
    "scatter": (
        _indexed_rows.SCATTER,
        FLOATS,
        st.builds(added, ROWS, SIZES, chosen(0, 1, 65), chosen(*_indexed_rows.SCATTER_KINDS), FLAG),
    ),
    "distinct": (
        _distinct_rows.DISTINCT,
        ("float32",),
        st.builds(lambda n, held, clips: _distinct_rows._spec("", n, held, clips), SIZES, SIZES.filter(bool), FLAG),
    ),
    "max_pool": (_max_pool.MAX_POOL, FLOATS, pool_specs(False)),
    "max_pool_gradient": (_max_pool.MAX_POOL_GRADIENT, FLOATS, pool_specs(True)),
    "dense_convolution": (_convolution.CONVOLUTION, ("float32",), convolution_specs(False)),
    "dense_convolution_gradient": (_convolution.CONVOLUTION_GRADIENT, ("float32",), convolution_specs(True)),
    "depthwise": (_depthwise.DEPTHWISE, FLOATS, depthwise_specs(False)),
    "depthwise_gradient": (_depthwise.DEPTHWISE_GRADIENT, FLOATS, depthwise_specs(True)),
    "random_bits": (
        _random_bits.RANDOM_BITS,
        ("float32",),
        st.builds(lambda rows, n, bits: _random_bits._spec("", (rows,), (n,), bits), ROWS, SIZES, chosen(8, 16, 32)),
    ),
}  # fmt: skip


# exp_shifted of native/cpu/cross_entropy.cc states a relative error of 5e-7; all else rounds its result once.
ROUNDINGS = {"cross_entropy": 4, "target_cross_entropy": 4}


# How many products each value of a result is the sum of.
SUMMED = {
    "product": lambda a, b, params: a.shape[-2 if params.get("a_turned") else -1],
    "small_products": lambda a, b, params: a.shape[-2 if params.get("a_turned") else -1],
    "dot": lambda a, b, params: a.shape[-1],
    "dense_convolution": lambda x, kernel, params: math.prod(kernel.shape[:3]),
    "dense_convolution_gradient": lambda x, cotangent, params: math.prod(cotangent.shape[:3]),
}


def accumulated(name, spec, xs, stock):
    """Higham (2002), 3.1: a product's k roundings, in float32, of the sum of absolute products."""
    k = SUMMED[name](*xs, spec.params)
    (sizes,) = oracle(stock, [jnp.abs(x) for x in xs])
    return (k + 2) * float(jnp.finfo("float32").eps) * sizes.max(initial=0)


def bounded(examples):
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


def as_written(function):
    """The reference without XLA's excess precision, which leaves out roundings that the dtype prescribes."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


def turned(function):
    """The function of transposed operands, which XLA has to bring into the kernel's order."""
    return jax.jit(lambda *xs: function(*(jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x for x in xs)))


def results(function, xs, transposed):
    if not transposed:
        return function(*xs)
    return turned(function)(*(jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x for x in xs))


@native
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@bounded(10)
@given(data=st.data())
def test_values_and_gradients_of_any_shape_are_as_exact_as_the_reference(name, data):
    op, specs = DIFFERENTIABLE[name]
    spec, dtype, transposed = data.draw(specs), data.draw(chosen(*FLOATS)), data.draw(FLAG)
    xs = operands_of(spec, dtype)
    wrt = float_indices(xs)
    pairs = [(f(op, spec), vjp_of(f(op, spec), xs, wrt)) for f in (run, reference)]
    for ours, stock in zip(*pairs):
        found = results(ours, xs, transposed)
        assert_as_good_as_reference(found, as_written(stock)(*xs), oracle(stock, xs), ROUNDINGS.get(name, 1))


@native
@pytest.mark.parametrize("name", OTHERS)
@bounded(20)
@given(data=st.data())
def test_values_of_any_shape_are_as_exact_as_the_reference(name, data):
    op, dtypes, specs = OTHERS[name]
    spec, dtype, transposed = data.draw(specs), data.draw(chosen(*dtypes)), data.draw(FLAG)
    xs = operands_of(spec, dtype)
    stock = reference(op, spec)
    found = results(run(op, spec), xs, transposed)
    sums = accumulated(name, spec, xs, stock) if name in SUMMED else 0.0
    assert_as_good_as_reference(found, as_written(stock)(*xs), oracle(stock, xs), 1, sums)


LENGTHS = st.sampled_from((0, 1, 2, 7, 8, 9, 15, 17, 63, 64, 65, 95, 97, 129, 257))


@st.composite
def attention_cases(draw):
    n, shared = draw(chosen(1, 2, 4)), draw(chosen(1, 2))
    batch, t, s = draw(chosen(1, 2)), draw(LENGTHS), draw(LENGTHS)
    shapes = {"bias": (1, 1, 1, s), "mask": (batch, 1, t, s), "keep": (batch, n * shared, t, s)}
    extras = {name: shape for name, shape in shapes.items() if draw(FLAG)}
    if draw(FLAG):
        extras |= {"query_segment_ids": (batch, t), "key_value_segment_ids": (batch, s)}
    band = draw(chosen((None, None), (None, 0), (-9, 4)))
    sizes = draw(SMALL), draw(SMALL)
    return Case((batch,), (n * shared, n), (t, s), sizes, extras=extras, options={"band": band, "scale": 0.3})


@native
@bounded(20)
@given(case=attention_cases(), dtype=chosen(*FLOATS))
def test_attention_of_any_shape_matches_float64(case, dtype):
    test_attention.assert_close(*test_attention.run(case, dtype), dtype)
