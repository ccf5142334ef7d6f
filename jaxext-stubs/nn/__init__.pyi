from jax.nn import *
