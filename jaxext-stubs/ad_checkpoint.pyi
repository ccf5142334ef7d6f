from jax.ad_checkpoint import *
