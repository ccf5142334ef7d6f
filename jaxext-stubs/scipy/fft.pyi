from jax.scipy.fft import *
