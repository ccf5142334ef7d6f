from jax.distributed import *
