"""Cross-entropy is found in every spelling, with its linear layer where the logits go nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import assert_agrees, assert_matched, assert_missed, normals, report_of
from jax import lax

import jaxext

B, T, F, V = 2, 6, 16, 40
LABELS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
STRAY = LABELS.at[0, 0].set(-100).at[0, 1].set(-3).at[1, 1].set(V + 9)
ONE_HOT = jax.nn.one_hot


def logits():
    return normals(1, (B, T, V))[0]


def of_label(array, labels=LABELS):
    return jnp.take_along_axis(array, labels[..., None], -1)[..., 0]


INTEGER = {
    "optax": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS),
    "optax, mean": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS).mean(),
    "optax under vmap": lambda z: jax.vmap(optax.softmax_cross_entropy_with_integer_labels)(z, LABELS),
    "optax, one-hot": lambda z: optax.softmax_cross_entropy(z, ONE_HOT(LABELS, V)),
    "take_along_axis": lambda z: -of_label(jax.nn.log_softmax(z)).mean(),
    "logsumexp less logit": lambda z: (jax.nn.logsumexp(z, -1) - of_label(z)).mean(),
    "logit less logsumexp": lambda z: of_label(z) - jax.nn.logsumexp(z, -1),
    "normalised logits": lambda z: -of_label(z - jax.nn.logsumexp(z, -1, keepdims=True)),
    "no maximum": lambda z: -of_label(z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))),
    "index per row": lambda z: jax.vmap(jax.vmap(lambda p, i: p[i]))(jax.nn.log_softmax(z), LABELS),
    "index arrays": lambda z: jax.nn.log_softmax(z)[jnp.arange(B)[:, None], jnp.arange(T), LABELS],
    "one-hot sum": lambda z: -jnp.sum(ONE_HOT(LABELS, V) * jax.nn.log_softmax(z), -1),
    "sum of everything": lambda z: -jnp.sum(jax.nn.log_softmax(z) * ONE_HOT(LABELS, V)) / LABELS.size,
    "einsum": lambda z: -jnp.einsum("btv,btv->bt", ONE_HOT(LABELS, V), jax.nn.log_softmax(z)),
    "comparison": lambda z: (
        -jnp.sum(jnp.where(LABELS[..., None] == jnp.arange(V), 1.0, 0.0) * jax.nn.log_softmax(z), -1)
    ),
    "weights inside": lambda z: -(ONE_HOT(LABELS, V) * jax.nn.log_softmax(z) * (LABELS > 5)[..., None]).sum((-1, -2)),
    "weights outside": lambda z: (optax.softmax_cross_entropy_with_integer_labels(z, LABELS) * (LABELS > 5)).sum(),
    "in remat": lambda z: jax.checkpoint(optax.softmax_cross_entropy_with_integer_labels)(z, LABELS),
    "in scan": lambda z: lax.map(lambda a: optax.softmax_cross_entropy_with_integer_labels(*a), (z, LABELS)),
}


@pytest.mark.parametrize("name", INTEGER)
def test_spellings_with_one_class_per_row(name):
    assert_matched(INTEGER[name], logits(), kernel="softmax_cross_entropy", detail=f"classes={V}, labels")


SMOOTHED = {
    "optax": lambda z: optax.softmax_cross_entropy(z, optax.smooth_labels(ONE_HOT(LABELS, V), 0.1)),
    "on and off": lambda z: (
        -jnp.sum(jnp.where(LABELS[..., None] == jnp.arange(V), 0.9 + 0.1 / V, 0.1 / V) * jax.nn.log_softmax(z), -1)
    ),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_labels(name):
    detail = f"classes={V}, labels, smoothing=0.1"
    assert_matched(SMOOTHED[name], logits(), kernel="softmax_cross_entropy", detail=detail)


def test_target_distributions_get_their_gradient():
    assert_matched(
        lambda z, t: optax.softmax_cross_entropy(z, jax.nn.softmax(t)),
        *normals(2, (B, T, V), (B, T, V)),
        kernel="softmax_cross_entropy",
        detail=f"classes={V}, targets",
    )


def test_labels_out_of_range_mean_what_they_mean_in_stock_jax():
    spellings = (
        lambda z: jnp.nan_to_num(optax.softmax_cross_entropy_with_integer_labels(z, STRAY)),
        lambda z: optax.softmax_cross_entropy(z, ONE_HOT(STRAY, V)),
        lambda z: jax.vmap(jax.vmap(lambda p, i: p[i]))(jax.nn.log_softmax(z), STRAY),
    )
    for spelling in spellings:
        assert_matched(spelling, logits(), kernel="softmax_cross_entropy")
    stray = report_of(spellings[0], logits())
    assert stray.kernels() == {"softmax_cross_entropy"}


def test_bfloat16_logits_widened_for_the_loss_stay_narrow():
    (z,) = normals(3, (B, T, V), dtype=jnp.bfloat16)

    def widened(z):
        return optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), LABELS)

    (entry,) = report_of(widened, z).replaced
    assert entry.shapes[0].startswith("bf16")
    assert_agrees(widened, z, tolerance=1e-2)


# ---------------------------------------------------------------- with the linear layer


def arrays():
    return normals(4, (B, T, F), (F, V), (V,))


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr("jaxext.kernels._linear_cross_entropy._LEAST_LOGITS", 0)


LINEAR = {
    "product": lambda x, w, b: optax.softmax_cross_entropy_with_integer_labels(x @ w, LABELS).mean(),
    "tied embedding": lambda x, w, b: -of_label(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, w.T))).mean(),
    "one-hot": lambda x, w, b: optax.softmax_cross_entropy(x @ w, ONE_HOT(LABELS, V)).mean(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_logits_used_once_are_not_made(name, any_size):
    assert_matched(LINEAR[name], *arrays(), kernel="linear_cross_entropy", detail=f"classes={V}, labels")


def test_a_bias_belongs_to_the_linear_layer(any_size):
    assert_matched(
        lambda x, w, b: optax.softmax_cross_entropy_with_integer_labels(x @ w + b, LABELS).mean(),
        *arrays(),
        kernel="linear_cross_entropy",
        detail=f"classes={V}, labels, bias",
    )


@pytest.mark.parametrize(
    "use",
    [lambda z: (z.argmax(-1) == LABELS).mean(), lambda z: z, lambda z: jnp.exp(z).sum()],
    ids=["accuracy", "returned", "other loss"],
)
def test_logits_used_elsewhere_are_made(use, any_size):
    def loss(x, w, b):
        z = x @ w + b
        return optax.softmax_cross_entropy_with_integer_labels(z, LABELS).mean(), use(z)

    assert_matched(loss, *arrays(), kernel="softmax_cross_entropy", detail=f"classes={V}, labels")


def test_logits_too_few_to_matter_are_made_and_the_reason_is_told():
    report = report_of(LINEAR["product"], *arrays())
    assert report.kernels() == {"softmax_cross_entropy", "matmul"}  # the product: of a gradient, over two dimensions
    (entry,) = report.fallbacks
    assert entry.kernel == "linear_cross_entropy"
    assert "logits are fewer than" in entry.reason


SEEN = (LABELS > 5).astype(jnp.float32)
# Labels that no row has, under a mask: their losses are NaN, and hidden.
HIDDEN = jnp.where(LABELS > 5, LABELS, -100)


def losses(x, w, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)


# What the losses of a batch become: whether every row counts the same, so that gradients are made beside the losses.
EVEN = {
    "mean": lambda x, w, b: losses(x, w).mean(),
    "half the sum": lambda x, w, b: -0.5 * of_label(jax.nn.log_softmax(x @ w)).sum(),
    "sums of sums": lambda x, w, b: losses(x, w).sum(-1).mean() / B,
    "shared by a number": lambda x, w, b: (losses(x, w) / jnp.abs(b).sum()).sum(),
    "masked mean": lambda x, w, b: (losses(x, w) * SEEN).sum() / SEEN.sum(),
    "negated and masked": lambda x, w, b: (SEEN * -of_label(jax.nn.log_softmax(x @ w))).sum(),
    "average": lambda x, w, b: jnp.average(losses(x, w), weights=jnp.abs(b[:T]) * SEEN),
    "mean of some": lambda x, w, b: jnp.mean(losses(x, w, HIDDEN), where=LABELS > 5),
    "chosen": lambda x, w, b: jnp.where(LABELS <= 5, 0.0, losses(x, w, HIDDEN)).sum() / SEEN.sum(),
}
UNEVEN = {
    "squares": lambda x, w, b: (losses(x, w) ** 2).mean(),
    "two uses": lambda x, w, b: (each := losses(x, w)).mean() + (each**2).mean(),
    "weighted later": lambda x, w, b: (losses(x, w).sum(-1) * b[:B]).sum(),
    "masked and squared": lambda x, w, b: ((losses(x, w) * SEEN) ** 2).sum(),
    "divisor": lambda x, w, b: (1.0 / losses(x, w)).sum(),
    "another value hides": lambda x, w, b: jnp.where(LABELS > 5, losses(x, w), 1.0).sum(),
    "its own weights": lambda x, w, b: ((each := losses(x, w)) * jax.nn.sigmoid(each)).sum(),
}


def made_beside_losses(function, *args):
    """Whether the exchanged linear layer and cross-entropy make gradients beside the losses."""
    text = str(jaxext.accelerate(function).trace(*args).jaxpr)
    assert "jaxext_linear_cross_entropy" in text
    return "jaxext_linear_cross_entropy_with_gradients" in text


@pytest.mark.parametrize("name", EVEN)
def test_losses_that_count_evenly_make_their_gradients_at_once(name, any_size):
    gradients = jax.value_and_grad(EVEN[name], (0, 1, 2))
    assert made_beside_losses(gradients, *arrays())
    assert_agrees(gradients, *arrays())


@pytest.mark.parametrize("name", UNEVEN)
def test_losses_that_count_unevenly_wait_for_their_cotangents(name, any_size):
    gradients = jax.value_and_grad(UNEVEN[name], (0, 1, 2))
    assert not made_beside_losses(gradients, *arrays())
    assert_agrees(gradients, *arrays(), tolerance=1e-4)


def test_losses_that_are_returned_wait_for_their_cotangents(any_size):
    def both(x, w, b):
        return (each := losses(x, w)).mean(), each

    assert not made_beside_losses(jax.grad(both, has_aux=True), *arrays())


# ---------------------------------------------------------------- near misses


def test_logits_transposed_by_the_program_have_their_classes_last():
    def contrastive(image, text, labels):
        logits = image @ text.T
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(logits, labels).mean() + losses(logits.T, labels).mean()

    arrays = (*normals(5, (8, 16), (8, 16)), jnp.arange(8))
    assert_matched(contrastive, *arrays, kernel="softmax_cross_entropy", count=2)


def test_classes_on_another_axis_are_a_near_miss():
    assert_missed(
        lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS, axis=1),
        logits().swapaxes(1, 2),
        kernel="softmax_cross_entropy",
        reason="the classes are not the last axis of the logits",
    )


def test_the_logit_of_another_array_is_a_near_miss():
    assert_missed(
        lambda z: jax.nn.logsumexp(z, -1) - of_label(jnp.tanh(z)),
        logits(),
        kernel="softmax_cross_entropy",
        reason="the logarithm and the label's logit are of different arrays",
    )


def test_log_probabilities_that_are_needed_anyway_are_a_near_miss():
    def with_entropy(z):
        chances = jax.nn.log_softmax(z)
        return of_label(chances) + 0.1 * jnp.sum(jnp.exp(chances) * chances, -1)

    reason = "the log-probabilities are used elsewhere too, so that they are computed anyway"
    assert_missed(with_entropy, logits(), kernel="softmax_cross_entropy", reason=reason)


def test_entropy_is_no_cross_entropy_of_labels():
    report = report_of(lambda z: -of_label(jnp.log(jax.nn.softmax(z) + 1e-3)), logits())
    assert not report.replaced


def test_a_batch_without_rows_is_left_to_stock_without_a_failure_of_the_matcher():
    """Found by distrax's tests of samples of shape (0,)."""

    def loss(logits, labels):
        chances = jax.nn.log_softmax(logits.reshape(-1, 5))
        return -jnp.take_along_axis(chances, labels.reshape(-1, 1), axis=-1).sum()

    logits, labels = jnp.zeros((0, 3, 5)), jnp.zeros((0, 3), jnp.int32)
    report = jaxext.explain(jax.grad(loss))(logits, labels)
    assert "failed" not in str(report)
    assert jaxext.accelerate(jax.grad(loss))(logits, labels).shape == (0, 3, 5)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("name", ["one-hot", "weights", "smoothed", "logsumexp"])
def test_batches_without_rows_and_rows_without_classes_stay_with_stock(name, shape):
    labels = jnp.zeros(shape[:-1], jnp.int32)

    def loss(z):
        hot, chances = ONE_HOT(labels, shape[-1]), jax.nn.log_softmax(z)
        match name:
            case "one-hot":
                return -(hot * chances).sum(-1)
            case "weights":
                return -(hot * chances * (labels > 1)[..., None]).sum()
            case "smoothed":
                return optax.softmax_cross_entropy(z, optax.smooth_labels(hot, 0.1)) if shape[-1] else hot.sum(-1)
            case _:
                return jax.nn.logsumexp(z, -1) - (hot * z).sum(-1)

    for function in (loss, jax.grad(lambda z: loss(z).sum())):
        assert "failed" not in str(jaxext.explain(function)(jnp.zeros(shape)))
        ours, stock = jaxext.accelerate(function)(jnp.zeros(shape)), jax.jit(function)(jnp.zeros(shape))
        np.testing.assert_array_equal(ours, stock)


def test_targets_divided_by_zero_are_left_to_stock_without_a_failure_of_the_matcher():
    loss = lambda z: -(ONE_HOT(LABELS, V) / 0.0 * jax.nn.log_softmax(z)).sum(-1)  # noqa: E731
    assert "failed" not in str(jaxext.explain(loss)(logits()))
    assert not np.isfinite(jaxext.accelerate(loss)(logits())).any()
