from jax.nn.initializers import *
