from jax.flatten_util import *
