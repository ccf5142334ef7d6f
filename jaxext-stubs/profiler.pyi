from jax.profiler import *
