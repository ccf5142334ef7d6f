"""linear_cross_entropy: the loss and gradients of logits that are never whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxext.kernels import linear_cross_entropy, linear_cross_entropy_refusal
from jaxext.kernels._op import native_status

needs_native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())

REDUCTIONS = {
    "mean": lambda losses, mask: losses.mean(),
    "masked": lambda losses, mask: (losses * mask).sum() / mask.sum(),
    "curved": lambda losses, mask: jnp.sin(losses).sum() / losses.size,
}


def problem(rows=(2, 150), features=24, classes=70, dtype="float32"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, features)), dtype)
    weight = jnp.asarray(rng.standard_normal((features, classes)) * 0.3, dtype)
    bias = jnp.asarray(rng.standard_normal(classes), dtype)
    labels = jnp.asarray(rng.integers(0, classes, rows), jnp.int32)
    return x, weight, bias, labels, jnp.asarray(rng.random(rows) < 0.7, jnp.float32)


def stock(x, weight, bias, labels, smoothing=0.0):
    logits = (x @ weight + bias).astype(jnp.promote_types(x.dtype, jnp.float32))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets).astype(x.dtype)


def same(ours, exact, dtype="float32", ulps=32):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=ulps * float(jnp.finfo(dtype).eps) * np.abs(b).max() + 1e-30)


def error(ours, exact):
    return [np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() for a, b in zip(ours, exact)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 150), (1031,), (0,)])
def test_losses_are_those_of_whole_logits(rows, smoothing):
    x, weight, bias, labels, _ = problem(rows)
    ours = linear_cross_entropy(x, weight, labels, bias, label_smoothing=smoothing)
    assert ours.shape == rows
    if ours.size:
        same(ours, stock(x, weight, bias, labels, smoothing))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_those_of_whole_logits_for_any_cotangent(reduction, uniform):
    x, weight, bias, labels, mask = problem((1031,))
    reduce = REDUCTIONS[reduction]
    ours = jax.grad(lambda *a: reduce(linear_cross_entropy(*a[:2], labels, a[2], uniform=uniform), mask), (0, 1, 2))
    whole = jax.grad(lambda *a: reduce(stock(*a, labels), mask), (0, 1, 2))
    same(jax.jit(ours)(x, weight, bias), jax.jit(whole)(x, weight, bias))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_as_exact_as_stock(dtype):
    x, weight, bias, labels, _ = problem((700,), dtype=dtype)

    def gradients(fn):
        return jax.jit(jax.grad(lambda *a: fn(*a).astype(jnp.float32).sum(), (0, 1, 2)))

    ours = gradients(lambda x, w, b: linear_cross_entropy(x, w, labels, b))(x, weight, bias)
    plain = gradients(lambda x, w, b: stock(x, w, b, labels))(x, weight, bias)
    exact = gradients(lambda x, w, b: stock(x, w, b, labels))(*(v.astype(jnp.float32) for v in (x, weight, bias)))
    floor = 4 * float(jnp.finfo(dtype).eps)
    for o, p, e in zip(error(ours, exact), error(plain, exact), exact):
        assert o <= 2 * p + floor * float(jnp.abs(e).max())


def test_weights_are_factors_with_a_gradient():
    x, weight, bias, labels, mask = problem()
    ours = jax.value_and_grad(lambda x, m: linear_cross_entropy(x, weight, labels, bias, weights=m).sum(), (0, 1))
    whole = jax.value_and_grad(lambda x, m: (stock(x, weight, bias, labels) * m).sum(), (0, 1))
    same(ours(x, mask), whole(x, mask))


def test_weights_that_are_booleans_hide_losses_whatever_they_are():
    x, weight, bias, labels, mask = problem()
    stray, seen = jnp.where(mask > 0, labels, -100), mask > 0
    ours = jax.value_and_grad(lambda *a: linear_cross_entropy(*a[:2], stray, a[2], weights=seen).sum(), (0, 1, 2))
    whole = jax.value_and_grad(lambda *a: (stock(*a, labels) * mask).sum(), (0, 1, 2))
    same(ours(x, weight, bias), whole(x, weight, bias))


def test_an_embedding_table_serves_the_other_way_round():
    x, weight, _, labels, _ = problem()
    loss = lambda w, first: linear_cross_entropy(x, w, labels, classes_first=first).mean()  # noqa: E731
    same(loss(weight.T, True), loss(weight, False))
    same(jax.grad(loss)(weight.T, True), jax.grad(loss)(weight, False).T)


def test_out_of_range_labels_are_those_of_the_cross_entropy():
    x, weight, _, _, _ = problem((3,))
    labels = jnp.array([-1, 70, 5])
    assert np.isnan(np.asarray(linear_cross_entropy(x, weight, labels))).tolist() == [False, True, False]
    assert linear_cross_entropy(x, weight, labels, out_of_range="zero")[:2].tolist() == [0.0, 0.0]


TRANSFORMS = {
    "remat": lambda f: jax.checkpoint(f),
    "jit": lambda f: jax.jit(f),
    "scan": lambda f: lambda *a: jax.lax.scan(lambda c, _: (c + f(*a), None), 0.0, None, length=2)[0],
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(jnp.stack([x, -x]), w).sum(),
    "vmap of weight": lambda f: lambda x, w: jax.vmap(f, (None, 0))(x, jnp.stack([w, -w])).sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_agree_with_whole_logits(transform):
    x, weight, bias, labels, _ = problem((260,))
    wrap = TRANSFORMS[transform]
    ours = wrap(lambda x, w: linear_cross_entropy(x, w, labels, bias).mean())
    whole = wrap(lambda x, w: stock(x, w, bias, labels).mean())
    same(jax.value_and_grad(ours, (0, 1))(x, weight), jax.value_and_grad(whole, (0, 1))(x, weight))


def test_forward_mode_and_second_derivatives_agree_with_whole_logits():
    x, weight, bias, labels, _ = problem((260,))
    tangents = (x * 0.1, weight * 0.3)
    values = []
    for fn in (lambda *a: linear_cross_entropy(*a, labels, bias).mean(), lambda *a: stock(*a, bias, labels).mean()):
        values.append((jax.jvp(fn, (x, weight), tangents), jax.jvp(jax.grad(fn, (0, 1)), (x, weight), tangents)))
    same(*values, ulps=256)


@needs_native
def test_temporaries_are_an_eighth_of_the_logits_and_their_gradient():
    x, weight, _, labels, _ = problem((2048,), 64, 8192)
    sizes = []
    for fn in (lambda x, w: linear_cross_entropy(x, w, labels), lambda x, w: stock(x, w, 0.0, labels)):
        step = jax.jit(jax.value_and_grad(lambda x, w, fn=fn: fn(x, w).mean(), (0, 1)))
        sizes.append(step.lower(x, weight).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] <= sizes[1] / 8


@pytest.mark.parametrize(
    ("change", "error_type", "text"),
    [
        (
            {"weight": jnp.ones((5, 7))},
            ValueError,
            "argument 'weight' must have shape [features, classes] with features",
        ),
        ({"weight": jnp.ones(4)}, ValueError, "arguments 'x' and 'weight' must have ranks >= 1 and 2, got shapes"),
        ({"labels": jnp.zeros(3)}, TypeError, "argument 'labels' must be integer classes, got float32; for target"),
        ({"labels": jnp.zeros(4, int)}, ValueError, "argument 'labels' must have shape (3,) to fit x of shape (3, 4)"),
        ({"bias": jnp.ones(6)}, ValueError, "argument 'bias' must have shape (7,), got (6,)"),
        ({"weights": jnp.ones(2)}, ValueError, "argument 'weights' must have shape (3,) to fit x of shape (3, 4)"),
        ({"x": jnp.ones((3, 4), int)}, TypeError, "argument 'x' must be floating point, got int32"),
        ({"label_smoothing": -0.1}, ValueError, "argument 'label_smoothing' must be within 0..1, got -0.1"),
    ],
)
def test_bad_arguments_are_named(change, error_type, text):
    arguments = {"x": jnp.ones((3, 4)), "weight": jnp.ones((4, 7)), "labels": jnp.zeros(3, int), **change}
    with pytest.raises(error_type) as caught:
        linear_cross_entropy(**arguments)
    assert text in str(caught.value)


@needs_native
def test_refusals_say_when_whole_logits_are_as_good():
    aval = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    labels = aval(2048, dtype=jnp.int32)
    wide = {"dtype": jnp.bfloat16}
    assert linear_cross_entropy_refusal(aval(2048, 64, **wide), aval(64, 8192, **wide), labels) is None
    assert linear_cross_entropy_refusal(aval(2**14, 64), aval(64, 2**14), aval(2**14, dtype=jnp.int32)) is None
    middling = linear_cross_entropy_refusal(aval(2048, 64), aval(64, 8192), labels)
    assert middling == "2048 x 8192 float32 logits are fewer than 268435456; making them whole is as fast"
    small = linear_cross_entropy_refusal(aval(100, 64), aval(64, 50), aval(100, dtype=jnp.int32))
    assert small == "100 x 50 float32 logits are fewer than 268435456; making them whole is as fast"
    half = linear_cross_entropy_refusal(aval(2048, 64, dtype=jnp.float16), aval(64, 8192), labels)
    assert half == "'x' is float16; the kernel takes float32 and bfloat16"
