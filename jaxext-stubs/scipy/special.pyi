from jax.scipy.special import *
