from jax.tree import *
