from jax.scipy.linalg import *
