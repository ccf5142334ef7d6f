from jax.scipy import *
