from jax.export import *
