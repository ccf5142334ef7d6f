from jax.sharding import *
