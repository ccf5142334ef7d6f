"""A program for `jaxext launch`: steps over a mesh of two stages, each on the two devices of a process.

Argument: a folder for the losses and for what this process has of the parameters.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).parent))

import meshed

import jaxext
from jaxext.pipelining import placement

# As if the parameters were large: what is small is on every process.
placement.SMALL = 1 << 10
mesh = meshed.mesh_of(2, 2, 1)
own = Mesh(np.array(jax.local_devices()).reshape(2, 1), ("data", "model"))
step, args, _ = meshed.plain(mesh, own)
pipelined = jaxext.pipeline(step, mesh=mesh, num_microbatches=4)
losses = []
for _ in range(3):
    params, state, loss, *_ = pipelined(*args)
    args = (params, state, *args[2:])
    losses.append(float(loss))
here = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    if leaf.is_fully_addressable
}
np.savez(Path(sys.argv[1]) / f"{jax.process_index()}.npz", losses=losses, **here)
