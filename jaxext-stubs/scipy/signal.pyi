from jax.scipy.signal import *
