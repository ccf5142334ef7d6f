from jax.image import *
