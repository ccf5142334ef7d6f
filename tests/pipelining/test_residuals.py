"""What a stage keeps for its backward pass: nothing that it can make again for less than it costs to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import dense, normal

import jaxext
from jaxext.pipelining.residuals import reduced

ROWS, WIDTH, LAYERS = 16, 64, 8


def backward_of(run, *types):
    """What is kept of `run`'s forward pass for its derivative, and the derivative's residuals as `jax.vjp` has them."""

    def forward(*arrays):
        result, pull = jax.vjp(run, *arrays)
        return [result, *jax.tree.leaves(pull)]

    function, kept, avals = reduced(jax.make_jaxpr(forward)(*types), 0, 1)
    arrays = [normal(n, *t.shape, dtype=t.dtype) for n, t in enumerate(types)]
    returned = jax.jit(function)(*arrays)
    own = kept.gather(arrays, returned)
    assert [(x.shape, x.dtype) for x in own] == [(aval.shape, aval.dtype) for aval in avals]
    return own, jax.jit(kept.all)(*own), jax.jit(forward)(*arrays)[1:]


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("run", "count"),
    [
        # tanh(x) and not 1 - tanh(x)²; the operand; the matrix.
        (lambda x, w: jnp.tanh(jnp.tanh(x) @ w), 3),
        # Reading x and y would cost more than the mask of bytes does.
        (lambda x, y: jnp.sum(jnp.where(x > y, jnp.sin(x), 0.0)), 2),
        # exp(x) is no cheap operation: it is kept, and what else the derivative takes is made from it and y.
        (lambda x, y: (lambda e: e * (0.5 * e + y))(jnp.exp(x)), 2),
    ],
    ids=["tanh", "mask", "exp"],
)
def test_residuals_that_are_arithmetic_on_others_are_made_again(run, count):
    own, made, expected = backward_of(run, f32(8, 8), f32(8, 8))
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        # A multiply and an add may be one rounding in one program and two in the other.
        np.testing.assert_allclose(one, other, rtol=2e-7, atol=1e-7)
    large = [array for array in own if array.size > 1]
    assert len(large) == count


def made(activation):
    def step(params, x):
        def loss_fn(params):
            y = x
            for w in params:
                y = activation(y @ w)
            return jnp.mean(y**2)

        return jax.value_and_grad(loss_fn)(params)

    params = [dense(n, WIDTH, WIDTH) for n in range(LAYERS)]
    return step, (params, normal(9, ROWS, WIDTH))


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_layer_of_tanh_keeps_one_array_for_each_microbatch_and_gives_plain_jaxs_gradients(schedule):
    step, args = made(jnp.tanh)
    pipelined = jaxext.pipeline(step, num_stages=4, num_microbatches=4, schedule=schedule)
    one = ROWS // 4 * WIDTH * 4
    # Two layers a stage; the first also keeps its examples, a slice of the batch, the last a factor of its loss.
    *before, last = [stage.residual_bytes for stage in pipelined.plan(*args).stages]
    assert before == [3 * one, 2 * one, 2 * one] and last <= 3 * one
    (loss, gradients), (expected, plain) = pipelined(*args), jax.jit(step)(*args)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for found, own in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(found, own, atol=1e-5 * np.abs(own).max())
