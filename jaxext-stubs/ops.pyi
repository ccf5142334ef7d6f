from jax.ops import *
