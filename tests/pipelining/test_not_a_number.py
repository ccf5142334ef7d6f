"""A loss that becomes NaN trains on exactly as in plain JAX; under jax_debug_nans the pass that made it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS

import jaxext


def made():
    step, args, _ = next(p for p in PROGRAMS if p.name == "multilayer_perceptron").make()
    params, state, x, labels = args
    # Of 16 examples in 4 microbatches this is in the third.
    return step, (params, state, x.at[9].set(jnp.inf), labels)


def test_without_debugging_it_spreads_as_in_plain_jit():
    step, args = made()
    want, got = jax.jit(step)(*args), jaxext.pipeline(step, num_stages=2, num_microbatches=4)(*args)
    assert np.isnan(want[2])
    for expected, found in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(np.isnan(expected), np.isnan(found))


def test_under_debugging_the_pass_and_the_microbatch_are_named():
    step, args = made()
    pipelined = jaxext.pipeline(step, num_stages=2, num_microbatches=4)
    where = r"pipeline: F2 of stage 0 \(microbatch 2 of 4\), on \S+ of process 0: .*(nan|NaN).* Look at these examples"
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=where):
        pipelined(*args)
