from jax.lax.linalg import *
