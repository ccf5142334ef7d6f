from jax.errors import *
