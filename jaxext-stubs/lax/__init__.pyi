from jax.lax import *
