from jax.scipy.optimize import *
