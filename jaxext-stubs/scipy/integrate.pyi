from jax.scipy.integrate import *
