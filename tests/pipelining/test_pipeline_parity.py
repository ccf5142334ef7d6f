"""A pipelined step gives what plain jit gives: losses, aux, every gradient and state leaf, on every program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import BATCH, PROGRAMS, WIDTH, dense, normal

import jaxext

BY_NAME = {program.name: program for program in PROGRAMS}
HALF = {"scan_over_layers_remat_bf16"}
# name of schedule, devices, microbatches: each program with three of them, all of them over the programs.
CASES = [("gpipe", 2, 2), ("1f1b", 2, 8), ("1f1b", 3, 4), ("interleaved_1f1b", 2, 4), ("zb_h1", 4, 8), ("zb_v", 2, 4),
         ("dualpipe_v", 2, 8), ("auto", 4, 4), ("1f1b", 4, 2), ("zb_h1", 2, 2)]  # fmt: skip
CHOSEN = [
    (program.name, *CASES[(3 * number + k * 4) % len(CASES)])
    for number, program in enumerate(PROGRAMS)
    for k in range(2)
]


def leaves(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(_words(leaf)) for path, leaf in found if isinstance(leaf, jax.Array)}


def _words(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def run(step, args, state, steps):
    """The results of each step, with the state of flax.nnx objects."""
    found = []
    for _ in range(steps):
        result = step(*args)
        objects = [arg for arg in args if isinstance(arg, nnx.Module | nnx.Optimizer)]
        found.append(leaves((result, [nnx.state(item) for item in objects])))
        args = (*result[:state], *args[state:]) if state else args
    return found


def difference(want, got):
    """The largest difference of a leaf, relative to its largest value."""
    assert want.keys() == got.keys()
    worst = 0.0
    for name, expected in want.items():
        if not np.issubdtype(expected.dtype, np.floating) and expected.dtype.name != "bfloat16":
            np.testing.assert_array_equal(expected, got[name], err_msg=name)
            continue
        a, b = expected.astype(np.float64), got[name].astype(np.float64)
        worst = max(worst, np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-6))
    return worst


def types(found):
    return [{name: (leaf.shape, leaf.dtype) for name, leaf in results.items()} for results in found]


def in_f32(x):
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def run_plain(name, cast=lambda x: x):
    """Three steps of plain JAX, from arguments that went through `cast`."""
    step, args, state = BY_NAME[name].make()
    return run(plainly(step), jax.tree.map(cast, args), state, 3)


def run_pipelined(name, schedule, stages, microbatches):
    """Three steps."""
    step, args, state = BY_NAME[name].make()
    pipelined = jaxext.pipeline(step, num_stages=stages, num_microbatches=microbatches, schedule=schedule)
    return run(pipelined, args, state, 3)


def plainly(step):
    return step if hasattr(step, "lower") else jax.jit(step)


@pytest.mark.parametrize(
    ("name", "schedule", "stages", "microbatches"), [case for case in CHOSEN if case[0] not in HALF]
)
def test_three_steps_agree_with_plain_jit(name, schedule, stages, microbatches):
    want = run_plain(name)
    got = run_pipelined(name, schedule, stages, microbatches)
    assert types(got) == types(want)
    # Optimizers that divide by a gradient's size blow up its rounding.
    assert max(map(difference, want, got)) <= 5e-5


@pytest.mark.parametrize(("name", "schedule", "stages", "microbatches"), [case for case in CHOSEN if case[0] in HALF])
def test_three_steps_in_half_precision_err_no_more_than_twice_what_plain_jit_does(name, schedule, stages, microbatches):
    exact, stock = run_plain(name, in_f32), run_plain(name)
    got = run_pipelined(name, schedule, stages, microbatches)
    assert types(got) == types(stock)
    assert max(map(difference, exact, got)) <= 2 * max(map(difference, exact, stock))


def gradient_step(loss_fn):
    """The gradients themselves, so that no optimizer hides a difference."""

    def step(params, *batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, *batch)
        return gradients, loss

    return step


def dropout_loss(params, x, key):
    for number, w in enumerate(params):
        x = jnp.tanh(x @ w)
        kept = jax.random.bernoulli(jax.random.fold_in(key, number), 0.7, x.shape)
        x = jnp.where(kept, x / 0.7, 0)
    return jnp.mean(x**2)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v", "auto"])
def test_every_gradient_leaf_agrees_to_1e_5_and_dropout_masks_are_the_same(schedule, microbatches):
    params = [dense(n, WIDTH, WIDTH) for n in range(8)]
    args = (params, normal(1, BATCH, WIDTH), jax.random.key(0))
    step = gradient_step(dropout_loss)
    got = jaxext.pipeline(step, num_stages=4, num_microbatches=microbatches, schedule=schedule)(*args)
    assert difference(leaves(jax.jit(step)(*args)), leaves(got)) <= 1e-5


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_any_number_of_stages_gives_the_same_gradients(stages):
    params = [dense(n, WIDTH, WIDTH) for n in range(9)]
    args = (params, normal(1, BATCH, WIDTH), jax.random.key(0))
    step = gradient_step(dropout_loss)
    got = jaxext.pipeline(step, num_stages=stages, num_microbatches=4)(*args)
    assert difference(leaves(jax.jit(step)(*args)), leaves(got)) <= 1e-5


def test_losses_of_20_steps_track_plain_jit():
    step, args, state = BY_NAME["multilayer_perceptron"].make()
    want = run(plainly(step), args, state, 20)
    got = run(jaxext.pipeline(step, num_stages=4, num_microbatches=8, schedule="zb_h1"), args, state, 20)
    assert max(map(difference, want, got)) <= 1e-4


def test_bf16_gradients_err_no_more_than_twice_what_plain_jax_does():
    params = [dense(n, WIDTH, WIDTH, dtype=jnp.bfloat16) for n in range(6)]
    x = normal(1, BATCH, WIDTH, dtype=jnp.bfloat16)

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    step = gradient_step(loss_fn)
    exact = leaves(jax.jit(step)(jax.tree.map(lambda w: w.astype(jnp.float32), params), x.astype(jnp.float32)))
    stock = leaves(jax.jit(step)(params, x))
    pipelined = leaves(jaxext.pipeline(step, num_stages=3, num_microbatches=8)(params, x))
    for name, want in exact.items():
        scale = np.abs(want).max()
        errors = [np.abs(want - found[name].astype(np.float32)).max() / scale for found in (stock, pipelined)]
        assert errors[1] <= 2 * errors[0] + 2.0**-9, name
