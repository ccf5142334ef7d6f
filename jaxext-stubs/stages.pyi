from jax.stages import *
