"""Arguments over many calls: fresh copies, feeding back, finding the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_step import loss_fn, make_args, train_step

from jaxext.abtest import state


def wire(step, args):
    return state.wire(step, args, step(*state.copy_args(args)))


def test_state_is_fed_back_and_the_loss_is_found():
    wiring = wire(train_step, make_args())
    assert wiring.feeds == ((0, 0), (1, 1))
    assert wiring.loss == "output[2]"
    assert wiring.describe() == "state: params, opt_state; loss: output[2]"


@pytest.mark.parametrize(
    ("outputs", "feeds", "loss"),
    [
        (lambda p, o, l: (l, p, o), ((1, 0), (2, 1)), "output[0]"),
        (lambda p, o, l: (p, o, {"accuracy": l * 0, "loss": l}), ((0, 0), (1, 1)), "output[2]['loss']"),
        (lambda p, o, l: (p, o), ((0, 0), (1, 1)), None),
        (lambda p, o, l: p, ((-1, 0),), None),
        (lambda p, o, l: l, (), "output"),
    ],
)
def test_orders_of_outputs(outputs, feeds, loss):
    wiring = wire(lambda *args: outputs(*train_step(*args)), make_args())
    assert wiring.feeds == feeds
    assert wiring.loss == loss


def test_gradients_are_not_taken_for_parameters():
    params, _, x, y = make_args()
    wiring = wire(jax.value_and_grad(loss_fn), (params, x, y))
    assert wiring.feeds == ()
    assert wiring.loss == "output[0]"


def test_a_learning_rate_is_not_taken_for_the_loss():
    def step(params, rate):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        return params - rate * grads, loss

    wiring = wire(step, (jnp.ones(4), jnp.float32(0.1)))
    assert wiring.feeds == ((0, 0),)
    assert wiring.loss == "output[1]"


def test_a_train_state_whose_counter_is_a_python_number_is_fed_back():
    def step(state, x):
        return {"count": state["count"] + 1, "w": state["w"] * 0.9}, jnp.sum(x * state["w"])

    wiring = wire(jax.jit(step), ({"count": 0, "w": jnp.ones(3)}, jnp.ones(3)))
    assert wiring.feeds == ((0, 0),)
    assert wiring.loss == "output[1]"


def test_copies_share_no_buffer_and_keep_other_values():
    args = ({"a": jnp.arange(3.0), "b": np.ones(2)}, 7, "static", jax.random.key(0))
    copied = state.copy_args(args)
    assert copied[1:3] == (7, "static")
    assert copied[0]["a"].unsafe_buffer_pointer() != args[0]["a"].unsafe_buffer_pointer()
    assert copied[0]["b"] is not args[0]["b"]
    assert jnp.array_equal(jax.random.key_data(copied[3]), jax.random.key_data(args[3]))


def test_modules_are_copied_with_their_shared_references():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 3, rngs=rngs)
            self.second = self.first

    model = Tied(nnx.Rngs(0))
    copied = state.copy_args((model, jnp.ones(2)))[0]
    assert copied is not model
    assert copied.first is copied.second
    assert copied.first.kernel[...].unsafe_buffer_pointer() != model.first.kernel[...].unsafe_buffer_pointer()


def test_modules_are_state_in_place_with_readable_leaf_names():
    @nnx.jit
    def step(model, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
        return loss

    args = (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3)))
    wiring = wire(step, args)
    assert wiring.in_place == (0,)
    assert wiring.loss == "output"
    assert set(state.leaves(wiring, args)) == {"model.kernel", "model.bias"}


def test_deleted_buffers_are_seen():
    array = jnp.ones(3)
    assert not state.is_deleted((array, 1))
    array.delete()
    assert state.is_deleted((array, 1))
