from jax.dtypes import *
