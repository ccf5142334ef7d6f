"""Steps that would come out differently on parts of the batch are refused, with the reason, the line and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from programs import BATCH, WIDTH, dense, normal

import jaxext
from jaxext.pipelining.refusal import Refusal

X = normal(0, BATCH, WIDTH)
WEIGHTS = [dense(n, WIDTH, WIDTH) for n in range(6)]
TWO = {"num_stages": 2, "num_microbatches": 4}


def step_of(loss_fn):
    def step(params, x):
        loss, gradients = jax.value_and_grad(loss_fn)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss

    return step


def hidden(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def statistics_of_the_batch(params, x):
    x = hidden(params, x)
    return jnp.mean(((x - x.mean(0)) / (x.std(0) + 1e-3)) ** 4)


def contrastive(params, x):
    z = hidden(params, x)
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T)))


def root_of_a_mean(params, x):
    return jnp.sqrt(jnp.mean(hidden(params, x) ** 2))


def sorted_examples(params, x):
    return jnp.mean(jnp.sort(hidden(params, x), axis=0)[0])


def largest_example(params, x):
    return jnp.max(hidden(params, x))


def product_of_sums(params, x):
    return jnp.mean(hidden(params, x)) * jnp.mean(x @ params[0])


def mixed_examples(params, x):
    return jnp.mean(hidden(params, x)[::-1] * x)


def noise_in_a_scan(params, x):
    def body(carry, w):
        h, key = carry
        key, own = jax.random.split(key)
        return (jnp.tanh(h @ w) * jax.random.bernoulli(own, 0.9, h.shape), key), None

    (x, _), _ = jax.lax.scan(body, (x, jax.random.key(0)), jnp.stack(params))
    return jnp.mean(x**2)


def loop_until_small(params, x):
    x = jax.lax.stop_gradient(hidden(params, x))
    y = jax.lax.while_loop(lambda y: jnp.sum(y**2) > 1, lambda y: y * 0.5, x)
    return jnp.mean(y * (x @ params[0]))


@jax.custom_vjp
def normalised_gradient(x):
    return x


normalised_gradient.defvjp(lambda x: (x, None), lambda _, ct: (ct / jnp.linalg.norm(ct),))


def custom_derivative_over_the_batch(params, x):
    return jnp.mean(normalised_gradient(hidden(params, x)) ** 2)


def prints(params, x):
    x = hidden(params, x)
    jax.debug.print("{}", x[0, 0])
    return jnp.mean(x**2)


def differences_of_neighbours(params, x):
    return jnp.sum(hidden(params, x[1:] - x[:-1]) ** 2)


def branches_on_the_size(params, x):
    x = hidden(params, x)
    return jnp.mean(x**2) if x.shape[0] == BATCH else jnp.mean(jnp.sin(x))


REFUSED = {
    statistics_of_the_batch: "a statistic of the batch goes into",
    contrastive: "more than one axis",
    root_of_a_mean: "sqrt of a sum over the batch is not a sum over examples",
    sorted_examples: "sort along the batch",
    largest_example: "reduce_max over the batch",
    product_of_sums: "mul of a sum over the batch is not a sum over examples",
    mixed_examples: "rev along the batch",
    noise_in_a_scan: "random_bits of the batch's shape inside a loop",
    loop_until_small: "a while loop runs for as long as the values of the batch say",
    custom_derivative_over_the_batch: "is not a sum over examples",
    prints: "has a side effect (debug_",
    differences_of_neighbours: "15 rows, made of the batch, are not those of 4 microbatches",
    branches_on_the_size: "another program at another batch size",
}


@pytest.mark.parametrize("loss_fn", REFUSED, ids=lambda f: f.__name__)
def test_a_loss_that_needs_the_whole_batch_is_refused(loss_fn):
    with pytest.raises(Refusal) as refused:
        jaxext.pipeline(step_of(loss_fn), **TWO)(WEIGHTS, X)
    assert REFUSED[loss_fn] in str(refused.value)
    assert refused.value.remedy


def test_the_refusal_names_the_users_line():
    with pytest.raises(Refusal, match=r"at .*test_refusals\.py:\d+ \(root_of_a_mean\)"):
        jaxext.pipeline(step_of(root_of_a_mean), **TWO)(WEIGHTS, X)


def test_batch_norm_of_linen_is_refused():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(WIDTH)(x)))
            return x

    variables = Model().init(jax.random.key(0), X)

    def step(params, x):
        def loss_fn(params):
            variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
            y, updates = Model().apply(variables_, x, mutable=["batch_stats"])
            return jnp.mean(y**2), updates

        (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss, updates

    with pytest.raises(Refusal, match="a statistic of the batch goes into"):
        jaxext.pipeline(step, **TWO)(variables["params"], X)


def test_batch_norm_of_nnx_is_refused_and_the_model_left_as_it_was():
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.state(model))

    def step(model, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 4))(model)
        optimizer.update(model, gradients)
        return loss

    with pytest.raises(Refusal):
        jaxext.pipeline(step, **TWO)(model, optimizer, X)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def mean_square(params, x):
    return jnp.mean(hidden(params, x) ** 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_stages": 2, "num_microbatches": 3},
            r"num_microbatches=3 does not divide the batch of 16\. Use one of 1, 2",
        ),
        ({"num_stages": 2, "num_microbatches": 16}, "leaves one example in each microbatch"),
        ({"num_stages": 2, "num_microbatches": 1}, "keeps one device busy at a time"),
        ({"num_stages": 99}, r"num_stages=99, but there are \d+ devices"),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_refused_with_what_can(options, message):
    with pytest.raises(Refusal, match=message):
        jaxext.pipeline(step_of(mean_square), **options)(WEIGHTS, X)


def test_more_stages_than_there_are_places_to_cut_are_refused():
    with pytest.raises(Refusal, match=r"num_stages=8, but the loss can be cut in \d at most"):
        jaxext.pipeline(step_of(mean_square), num_stages=8, num_microbatches=4)(WEIGHTS[:1], X)


def test_a_step_that_differentiates_nothing_is_refused():
    with pytest.raises(Refusal, match="differentiates nothing"):
        jaxext.pipeline(lambda params, x: hidden(params, x), **TWO)(WEIGHTS, X)


def test_two_losses_are_refused_by_name():
    def step(params, x):
        a = jax.grad(mean_square)(params, x)
        b = jax.grad(root_of_a_mean)(params, x)
        return a, b

    with pytest.raises(Refusal, match=r"differentiates 2 functions \(mean_square, root_of_a_mean\)"):
        jaxext.pipeline(step, **TWO)(WEIGHTS, X)


def test_a_loss_differentiated_inside_a_loop_is_refused():
    def step(params, x):
        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(mean_square)(params, part)), None

        return jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), x.reshape(4, -1, WIDTH))[0]

    with pytest.raises(Refusal, match="differentiated inside a loop"):
        jaxext.pipeline(step, **TWO)(WEIGHTS, X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "2f2b"}, ValueError, "expected one of gpipe, 1f1b"),
        ({"num_stages": 0}, ValueError, r"pipeline\(num_stages=0\): expected a whole number of at least 1"),
        ({"num_microbatches": 2.5}, ValueError, r"num_microbatches=2\.5"),
        ({"num_chunks": 3}, ValueError, "1f1b has 1 a device"),
        ({"batch_argnames": "images"}, ValueError, "the step's arguments are params, x"),
        ({"donate_argnums": 7}, ValueError, "the step's arguments are params, x"),
        ({"in_shardings": None}, TypeError, "unknown option 'in_shardings'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_an_error_that_names_it(options, error, message):
    with pytest.raises(error, match=message):
        jaxext.pipeline(step_of(mean_square), **options)


def test_a_step_that_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="expected a callable"):
        jaxext.pipeline(3)
