"""Four hosts with a slow link: the bits of one process, and the time that is predicted from what was measured."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from four_hosts import arguments, step
from network import NotPermitted, address, hosts

import jaxext

PROGRAM = Path(__file__).parent / "four_hosts.py"
KBIT, DELAY_MS, STEPS = 1000, 10, 3
# Seconds of a forward pass: passes take longer than their messages of 66 ms, or messages wait for each other.
CASES = {"1f1b": 0.15, "gpipe": 0.03}


def run_on(names, folder):
    """The program as one process in each namespace; their output and exit codes."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    launch = [sys.executable, "-P", "-m", "jaxext", "launch", "-n", str(len(names))]
    cases = [str(word) for case in CASES.items() for word in case]
    where = [str(PROGRAM), str(folder), str(STEPS), *cases]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launch, "--rank", str(rank), "--coordinator", f"{address(0)}:5077", *where],
            env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    try:
        return [(process.communicate(timeout=300)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_here():
    """The losses and parameters of as many steps over devices of this process."""
    pipelined = jaxext.pipeline(step, num_stages=4, num_microbatches=4, schedule="1f1b")
    params, x = arguments()
    losses = []
    for _ in range(2 + STEPS):
        params, loss = pipelined(params, x)
        losses.append(float(loss))
    return losses, params


def test_four_hosts_on_a_slow_link_give_the_bits_of_one_process_in_the_time_that_is_predicted(tmp_path):
    try:
        with hosts(4, KBIT, DELAY_MS) as (names, delayed):
            done = run_on(names, tmp_path)
    except NotPermitted as reason:
        pytest.skip(f"four hosts on a shaped link: {reason}")
    assert not any(code for _, code in done), "\n".join(output for output, _ in done)
    losses, params = run_here()
    for schedule in CASES:
        found = [json.loads((tmp_path / f"{schedule}_{rank}.json").read_text()) for rank in range(4)]
        for rank, own in enumerate(found):
            assert own["losses"] == losses
            (mine,) = np.load(tmp_path / f"{schedule}_{rank}.npz").values()
            np.testing.assert_array_equal(mine, params[rank])
        check_times(found, delayed)


def check_times(found, delayed):
    # All know the same link. Of a message of 8 KiB the shaper lets a packet of 1.6 KB through at once.
    link, *others = [(own["latency"], own["bandwidth"]) for own in found]
    assert others == [link] * 3
    assert 0.5 * KBIT * 125 < link[1] < 1.35 * KBIT * 125
    assert not delayed or link[0] > DELAY_MS * 1e-3
    measured = statistics.median(max(own["seconds"][n] for own in found) for n in range(STEPS))
    assert measured == pytest.approx(found[0]["predicted"], rel=0.15)


def test_where_hosts_cannot_be_made_one_line_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotPermitted, match=r"^the command ip is not here$"), hosts(2, KBIT, DELAY_MS):
        pass
