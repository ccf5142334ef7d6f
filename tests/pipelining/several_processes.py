"""A program for `jaxext launch`: steps over as many processes as there are, each stage's results written to a folder.

Arguments: folder, program of programs.py, schedule, microbatches, steps, what goes wrong, for how many seconds.
"""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from programs import PROGRAMS

import jaxext

folder, name, schedule, microbatches, steps, fault, *seconds = sys.argv[1:]
late = float(seconds[0]) if seconds else 0.0
rank = jax.process_index()
step, args, state = next(p for p in PROGRAMS if p.name == name).make()
count = int(microbatches) * (2 if fault == "plan" and rank == 1 else 1)
timeout = {"stalled": 15.0, "absent": 5.0}.get(fault, 120.0)
if fault == "nan":
    jax.config.update("jax_debug_nans", True)
    args = (*args[:2], args[2].at[9].set(np.inf), *args[3:])
pipelined = jaxext.pipeline(step, num_microbatches=count, schedule=schedule, timeout=timeout)
losses = []
for number in range(int(steps)):
    if fault == "killed" and rank == 1 and number == 1:
        os._exit(9)
    if fault in ("stalled", "late") and rank == 1 and number == 1:
        time.sleep(late or 150)
    if fault in ("absent", "late") and rank == 1 and number == 0:
        time.sleep(late or 150)
    results = pipelined(*args)
    args = (*results[:state], *args[state:])
    losses.append(float(results[state]))
saved = {"losses": np.array(losses)}
for path, leaf in jax.tree_util.tree_flatten_with_path(results[0])[0]:
    if leaf.is_fully_addressable:
        saved[jax.tree_util.keystr(path)] = np.asarray(leaf)
np.savez(Path(folder) / f"{rank}.npz", **saved)
print(f"process {rank}: loss {losses[-1]:.6f}")
