from jax.api_util import *
