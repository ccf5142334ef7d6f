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
CHECK = Path(__file__).parent / "link_check.py"
# kbit/s and milliseconds of delay. Messages of 8 KiB take 16 ms on the first link and 3 ms on the others.
LINKS = [(4000, 0), (20000, 10), (20000, 20)]
# Link, schedule, seconds of a forward pass. Without delay passes take longer than messages, or messages wait for each
# other; with one, it is so much of the step that within the 15% of the prediction no step looks like one without it.
CASES = [(0, "1f1b", 0.04), (0, "gpipe", 0.01), (1, "1f1b", 0.01), (2, "1f1b", 0.02)]
STEPS = 3


@pytest.fixture(scope="module")
def names():
    """Four hosts on the links."""
    try:
        with hosts(4, LINKS) as names:
            yield names
    except NotPermitted as reason:
        pytest.skip(f"four hosts on shaped links: {reason}")


def inside(name, *words):
    """This Python in a namespace, before others on this machine: a host has cores of its own."""
    command = ["ip", "netns", "exec", name, "nice", "-n", "-10", sys.executable, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def environment():
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def run_on(names, folder):
    """The program as one process in each namespace; their output and exit codes."""
    launch = ["-P", "-m", "jaxext", "launch", "-n", len(names), "--coordinator", f"{address(0)}:5077"]
    where = [PROGRAM, folder, STEPS, *(word for case in CASES for word in case)]
    processes = [inside(name, *launch, "--rank", rank, *where) for rank, name in enumerate(names)]
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


@pytest.mark.parametrize(("link", "kbit", "delay_ms"), [(n, *link) for n, link in enumerate(LINKS)])
def test_the_links_have_the_bandwidth_and_delay_that_they_are_given(names, link, kbit, delay_ms):
    answering = inside(names[1], "-I", CHECK, "answer", address(1, link), kbit * 25)
    assert answering.stdout.readline() == "ready\n"
    asking = inside(names[0], "-I", CHECK, "ask", address(1, link), kbit * 25)
    trips = json.loads(asking.communicate(timeout=60)[0])
    rate = float(answering.communicate(timeout=60)[0])
    # No trip is shorter than the delay; some milliseconds are the processes', and more of most trips' where others want
    # the cores.
    assert 2e-3 * delay_ms <= min(trips) <= 2e-3 * delay_ms + 8e-3
    # Of the 1500 bytes of a packet 1448 are no headers.
    assert rate == pytest.approx(kbit * 125 * 1448 / 1500, rel=0.15)


def test_four_hosts_give_the_bits_of_one_process_in_the_time_that_is_predicted(names, tmp_path):
    done = run_on(names, tmp_path)
    assert not any(code for _, code in done), "\n".join(output for output, _ in done)
    losses, params = run_here()
    for number, (link, _, _) in enumerate(CASES):
        found = [json.loads((tmp_path / f"{number}_{rank}.json").read_text()) for rank in range(4)]
        for rank, own in enumerate(found):
            assert own["losses"] == losses
            (mine,) = np.load(tmp_path / f"{number}_{rank}.npz").values()
            np.testing.assert_array_equal(mine, params[rank])
        check_times(found, *LINKS[link])


def check_times(found, kbit, delay_ms):
    # All know the same link. Of a message of 8 KiB the shaper lets a packet of 1.6 KB through at once.
    link, *others = [(own["latency"], own["bandwidth"]) for own in found]
    assert others == [link] * 3
    assert 0.5 * kbit * 125 < link[1] < 1.35 * kbit * 125
    assert delay_ms * 1e-3 <= link[0] <= delay_ms * 1e-3 + 4e-3
    measured = statistics.median(max(own["seconds"][n] for own in found) for n in range(STEPS))
    assert measured == pytest.approx(found[0]["predicted"], rel=0.15)
    # A prediction that did not know of the delay would be wrong.
    assert not delay_ms or measured > 1.15 * found[0]["undelayed"]


def test_where_hosts_cannot_be_made_one_line_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotPermitted, match=r"^the command ip is not here$"), hosts(2, LINKS):
        pass
