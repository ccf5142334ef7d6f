from jax.debug import *
