from jax.dlpack import *
