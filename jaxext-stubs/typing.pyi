from jax.typing import *
