"""softmax_cross_entropy: the public function beside optax, at the edges where losses differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxext.kernels import softmax_cross_entropy, softmax_cross_entropy_refusal
from jaxext.kernels._op import native_status

needs_native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())


def logits_of(*shape, dtype="float32", seed=0):
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def labels_of(*shape, classes, low=0):
    return jnp.asarray(np.random.default_rng(1).integers(low, classes, shape), jnp.int32)


def same(ours, stock, dtype="float32", ulps=16):
    ours, stock = np.asarray(ours, np.float64), np.asarray(stock, np.float64)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(stock))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(stock))
    finite = np.isfinite(stock)
    scale = np.abs(stock[finite]).max(initial=1.0)
    np.testing.assert_allclose(ours[finite], stock[finite], rtol=0, atol=ulps * float(jnp.finfo(dtype).eps) * scale)


def with_gradient(loss):
    return lambda z: (loss(z), jax.vjp(loss, z)[1](jnp.ones(z.shape[:-1], loss(z).dtype))[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_integer_labels_are_optax(dtype):
    z, y = logits_of(4, 5, 130, dtype=dtype), labels_of(4, 5, classes=130)
    ours = with_gradient(lambda z: softmax_cross_entropy(z, y))(z)
    stock = with_gradient(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, y))(z)
    for a, b in zip(ours, stock):
        assert a.dtype == b.dtype
        same(a, b, dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_one_hot_and_smoothed_targets_are_optax(smoothing):
    z, y = logits_of(6, 77), labels_of(6, classes=80, low=-3)
    targets = optax.smooth_labels(jax.nn.one_hot(y, 77), smoothing)
    stock = with_gradient(lambda z: optax.softmax_cross_entropy(z, targets))(z)
    ours = with_gradient(lambda z: softmax_cross_entropy(z, y, label_smoothing=smoothing, out_of_range="zero"))(z)
    dense = with_gradient(lambda z: softmax_cross_entropy(z, targets))(z)
    for a, b, c in zip(ours, dense, stock):
        same(a, c)
        same(b, c)


def test_smoothing_of_given_targets_is_smoothing_them_first():
    z, targets = logits_of(6, 77), jax.nn.softmax(logits_of(6, 77, seed=2))
    stock = optax.softmax_cross_entropy(z, optax.smooth_labels(targets, 0.2))
    same(softmax_cross_entropy(z, targets, label_smoothing=0.2), stock)


@pytest.mark.parametrize("label", [-1, -9, -10, 9, 10, 2**31 - 1, -(2**31)])
def test_labels_out_of_range_wrap_once_and_then_give_nan_as_optax(label):
    z, y = logits_of(3, 9), jnp.array([label, 0, 8], jnp.int32)
    ours = with_gradient(lambda z: softmax_cross_entropy(z, y))(z)
    stock = with_gradient(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, y))(z)
    same(ours[0], stock[0])
    same(ours[1], stock[1])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_any_integer_dtype_is_a_label(dtype):
    z, y = logits_of(5, 60), labels_of(5, classes=60)
    np.testing.assert_array_equal(softmax_cross_entropy(z, y.astype(dtype)), softmax_cross_entropy(z, y))


def test_an_unsigned_label_above_int32_is_out_of_range():
    y = jnp.array([2**32 - 1, 3], jnp.uint32)
    assert np.isnan(np.asarray(softmax_cross_entropy(logits_of(2, 9), y))).tolist() == [True, False]


HOSTILE = {
    "masked": lambda z: z.at[:, 4:].set(-jnp.inf),
    "label masked": lambda z: z.at[:, 1].set(-jnp.inf),
    "all masked": lambda z: z.at[0].set(-jnp.inf),
    "infinite": lambda z: z.at[0, 3].set(jnp.inf),
    "infinite label": lambda z: z.at[0, 1].set(jnp.inf),
    "nan": lambda z: z.at[1, 5].set(jnp.nan),
    "infinite and nan": lambda z: z.at[0, 3].set(jnp.inf).at[0, 7].set(jnp.nan),
    "huge": lambda z: z * 1e30,
    "far apart": lambda z: z.at[:, 0].add(500.0),
}


@pytest.mark.parametrize("classes", [9, 40])
@pytest.mark.parametrize("name", HOSTILE)
def test_infinite_and_nan_logits_give_what_optax_gives(name, classes):
    z, y = HOSTILE[name](logits_of(3, classes)), jnp.array([1, 1, 2], jnp.int32)
    ours = with_gradient(lambda z: softmax_cross_entropy(z, y))(z)
    stock = with_gradient(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, y))(z)
    for a, b in zip(ours, stock):
        same(a, b)
    one_hot = jax.nn.one_hot(y, classes)
    stock = optax.softmax_cross_entropy(z, one_hot)
    same(softmax_cross_entropy(z, y, out_of_range="zero"), stock)
    same(softmax_cross_entropy(z, one_hot), stock)


def test_targets_have_a_gradient_too():
    z, targets = logits_of(4, 33), jax.nn.softmax(logits_of(4, 33, seed=2))
    ours = jax.grad(lambda z, t: softmax_cross_entropy(z, t).sum(), (0, 1))(z, targets)
    stock = jax.grad(lambda z, t: optax.softmax_cross_entropy(z, t).sum(), (0, 1))(z, targets)
    for a, b in zip(ours, stock):
        same(a, b)


def test_a_bfloat16_model_may_ask_for_a_float32_loss():
    z, y = logits_of(9, 200, dtype="bfloat16"), labels_of(9, classes=200)
    loss = softmax_cross_entropy(z, y, out_dtype=jnp.float32)
    same(loss, optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), y))


@needs_native
def test_the_gradient_takes_two_calls():
    z, y = logits_of(9, 200), labels_of(9, classes=200)
    text = jax.jit(jax.grad(lambda z: softmax_cross_entropy(z, y).mean())).lower(z).as_text()
    assert text.count("@jaxext_cross_entropy(") == 1 and text.count("@jaxext_cross_entropy_backward(") == 1


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4)), jnp.zeros((4,), int)),
            ValueError,
            "argument 'labels' must have shape (3,) (integer classes) or (3, 4) (floating-point targets) to fit "
            "logits of shape (3, 4), got int32 of shape (4,)",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4)), jnp.zeros(3)),
            TypeError,
            "argument 'labels' of shape (3,) must be integers, got float32; cast them with labels.astype(int)",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4)), jnp.zeros(3, bool)),
            TypeError,
            "argument 'labels' must be integer classes or floating-point targets, got bool",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 0)), jnp.zeros(3, int)),
            ValueError,
            "argument 'logits' must have a last axis of size >= 1 (the classes), got shape (3, 0)",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4), int), jnp.zeros(3, int)),
            TypeError,
            "argument 'logits' must be floating point, got int32; cast them with logits.astype(...)",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4)), jnp.zeros(3, int), label_smoothing=1.5),
            ValueError,
            "argument 'label_smoothing' must be within 0..1, got 1.5",
        ),
        (
            lambda: softmax_cross_entropy(jnp.ones((3, 4)), jnp.zeros(3, int), out_of_range="clip"),
            ValueError,
            "argument 'out_of_range' must be 'nan' or 'zero', got 'clip'",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@needs_native
def test_refusals_name_the_dtype():
    z, y = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int8)
    assert softmax_cross_entropy_refusal(z, y) is None and softmax_cross_entropy_refusal(z, z) is None
    half = jax.ShapeDtypeStruct((4, 8), jnp.float16)
    assert softmax_cross_entropy_refusal(half, y) == "'logits' is float16; the kernel takes float32 and bfloat16"
    assert softmax_cross_entropy_refusal(z, half) == "'labels' is float16; the kernel takes float32 and bfloat16"


@needs_native
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_one_class_the_gradient_is_zero(smoothing):
    z, cotangents = logits_of(65, 1), logits_of(65, seed=3)
    _, pull = jax.vjp(lambda z: softmax_cross_entropy(z, jnp.zeros(65, int), label_smoothing=smoothing), z)
    np.testing.assert_array_equal(pull(cotangents)[0], jnp.zeros_like(z))


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_a_common_offset_of_the_logits_costs_the_gradient_no_precision(offset):
    z, y = logits_of(64, 1000) + offset, labels_of(64, classes=1000)
    wide = np.asarray(z, np.float64)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    exact = p / p.sum(-1, keepdims=True) - np.eye(1000)[np.asarray(y)]
    for labels in (y, jax.nn.one_hot(y, 1000)):
        grad = jax.grad(lambda z: softmax_cross_entropy(z, labels).sum())(z)  # noqa: B023
        np.testing.assert_allclose(grad, exact, rtol=0, atol=4 * float(jnp.finfo("float32").eps))
