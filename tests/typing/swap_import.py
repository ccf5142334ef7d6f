"""What type checkers see of the swap-in import; checked by pyright, not run."""

from typing import assert_type

import jax as stock
import jaxext.numpy as jnp
import jaxext.scipy.special
import jaxext.tree_util as jtu
from jaxext.nn import initializers
from jaxext.numpy import linalg
from jaxext.sharding import PartitionSpec

import jaxext as jax
from jaxext import lax, nn, random


@jax.jit
def step(x: jax.Array) -> jax.Array:
    return jnp.sin(nn.softmax(x)) + lax.stop_gradient(linalg.norm(x))


key = random.key(0)
start = initializers.normal()(key, (3,))
assert_type(jnp.ones(3), stock.Array)
assert_type(PartitionSpec("data"), stock.sharding.PartitionSpec)
assert_type(jax.is_installed(), bool)
leaves: list[object] = jtu.tree_leaves({"x": jaxext.scipy.special.erf(start)})
ticket: jnp.ndarray = start
jnp.no_such_function()  # pyright: ignore[reportAttributeAccessIssue]
