from jax.custom_batching import *
