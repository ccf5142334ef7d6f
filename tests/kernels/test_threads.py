"""Kernels called from many threads at once: the bits of one thread, and no deadlock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxext.kernels._op import native_status

PROGRAM = Path(__file__).with_name("threads_program.py")


def run(threads, rounds, **environment):
    """The program's output; its own watchdog prints every thread's stack and ends it, long before the timeout."""
    command = [sys.executable, str(PROGRAM), str(threads), str(rounds)]
    environment = {**os.environ, "XLA_FLAGS": "", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())
@pytest.mark.parametrize(("threads", "rounds"), [(8, 3)])
def test_many_threads_get_the_bits_that_one_gets(threads, rounds):
    assert "calls agree" in run(threads, rounds)


@pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())
def test_no_kernel_waits_for_a_task_that_only_a_waiting_thread_could_run():
    # XLA's pool has two threads here, and each is inside a kernel that has tasks to share.
    assert "calls agree" in run(16, 1, NPROC="2", PJRT_NPROC="2")
