from jax.ref import *
