"""A pipeline over processes gives bit for bit what it gives over devices of one process, and fails by name."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import PROGRAMS

import jaxext

PROGRAM = Path(__file__).parent / "several_processes.py"


def launch(folder, processes, *arguments, program=PROGRAM):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-P", "-m", "jaxext", "launch", "-n", str(processes), str(program), str(folder)]
    return subprocess.run([*command, *map(str, arguments)], env=kept, capture_output=True, text=True, timeout=300)


def run_here(name, schedule, devices, steps=3):
    """The losses, and the results of the last step, over devices of this process."""
    step, args, state = next(program for program in PROGRAMS if program.name == name).make()
    pipelined = jaxext.pipeline(step, num_stages=devices, num_microbatches=4, schedule=schedule)
    losses, results = [], None
    for _ in range(steps):
        results = pipelined(*args)
        args = (*results[:state], *args[state:])
        losses.append(float(results[state]))
    return losses, results


@pytest.mark.parametrize(
    ("name", "schedule", "processes"),
    [("multilayer_perceptron", "zb_v", 2), ("linen_dropout", "1f1b", 2), ("tied_embedding_masked_mean", "zb_h1", 4)],
)
def test_processes_give_the_bits_that_devices_of_one_process_give(name, schedule, processes, tmp_path):
    done = launch(tmp_path, processes, name, schedule, 4, 3, "")
    assert done.returncode == 0, done.stdout + done.stderr
    losses, results = run_here(name, schedule, processes)
    found = {}
    for rank in range(processes):
        saved = dict(np.load(tmp_path / f"{rank}.npz"))
        np.testing.assert_array_equal(saved.pop("losses"), losses)
        found |= saved
    for path, leaf in jax.tree_util.tree_flatten_with_path(results[0])[0]:
        np.testing.assert_array_equal(found[jax.tree_util.keystr(path)], leaf)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "from process 1, which is gone"),
        ("stalled", "from process 1, which has not sent it for 15 s. Look at the log of process 1"),
        ("absent", "process 0 has waited 5 s for process 1 to come to the first pipelined step. Look at the log of"),
        ("nan", "which has failed: pipeline: F2 of stage 0 (microbatch 2 of 4)"),
        ("plan", "Start all processes with the same program, arguments and packages"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_an_error_that_names_it(fault, message, tmp_path):
    start = time.monotonic()
    done = launch(tmp_path, 2, "multilayer_perceptron", "1f1b", 4, 3, fault)
    assert done.returncode != 0
    assert message in done.stdout
    assert "jaxext launch: process" in done.stderr
    # The stalled process would sleep on; nobody waits for it.
    assert time.monotonic() - start < 140


def test_processes_wait_for_one_that_is_late_to_its_first_step_or_within_a_later_one(tmp_path):
    done = launch(tmp_path, 2, "multilayer_perceptron", "1f1b", 4, 3, "late", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    losses, _ = run_here("multilayer_perceptron", "1f1b", 2)
    np.testing.assert_array_equal(np.load(tmp_path / "0.npz")["losses"], losses)


def test_launching_no_process_is_an_error():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jaxext", "launch", "-n", "0", "x.py"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "-n 0: expected at least 1" in done.stderr
