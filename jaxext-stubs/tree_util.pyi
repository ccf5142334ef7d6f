from jax.tree_util import *
