from jax.ffi import *
