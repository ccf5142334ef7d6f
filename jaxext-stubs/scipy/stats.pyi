from jax.scipy.stats import *
