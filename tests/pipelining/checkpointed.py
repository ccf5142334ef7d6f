"""A program for `jaxext launch`: a run that saves every step with orbax and goes on from the last one that it finds.

Arguments: folder of the checkpoints, program of programs.py, microbatches, steps, the step that kills process 1.
"""

import os
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).parent))

from programs import PROGRAMS

import jaxext

folder, name, microbatches, steps, killed_at = sys.argv[1:]
step, args, count = next(p for p in PROGRAMS if p.name == name).make()
pipelined = jaxext.pipeline(step, num_microbatches=int(microbatches), timeout=60.0)
state, batch = args[:count], args[count:]
options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
with ocp.CheckpointManager(folder, options=options) as manager:
    last = manager.latest_step()
    if last is not None:
        state = manager.restore(last, args=ocp.args.StandardRestore(pipelined.gather(state)))
    for number in range(0 if last is None else last + 1, int(steps)):
        if jax.process_index() == 1 and number == int(killed_at):
            os._exit(9)
        *state, loss = pipelined(*state, *batch)[: count + 1]
        state = tuple(state)
        print(f"step {number}: loss {float(loss).hex()}", flush=True)
        manager.save(number, args=ocp.args.StandardSave(pipelined.gather(state)))
