from jax.core import *
