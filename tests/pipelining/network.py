"""Hosts on one machine: network namespaces joined by a bridge, with the bandwidth and delay of a real link."""

import contextlib
import os
import shutil
import subprocess

# A packet of Ethernet and its headers: the least that the shaper lets through at once.
_PACKET = 1600


class NotPermitted(Exception):
    """Namespaces cannot be made here: why."""


def command(*words):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def hosts(count, kbit, delay_ms):
    """Names of namespaces; number n has the address `address(n)`. What they send is shaped to kbit/s and delayed.

    Gives their names and whether there is a delay: some kernels come without netem, and have tbf for the rate alone.

    Raises:
      NotPermitted: it takes root, and the commands ip and tc.
    """
    for name in ("ip", "tc"):
        if shutil.which(name) is None:
            raise NotPermitted(f"the command {name} is not here")
    prefix = f"jx{os.getpid() % 100000}"
    names = [f"{prefix}n{number}" for number in range(count)]
    bridge = f"{prefix}b"
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(subprocess.run, ["ip", "link", "del", bridge], capture_output=True)
            command("ip", "link", "add", bridge, "type", "bridge")
            command("ip", "link", "set", bridge, "up")
            delayed = [_host(stack, bridge, name, number, kbit, delay_ms) for number, name in enumerate(names)]
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            raise NotPermitted(f"network namespaces cannot be made: {reason.strip()}") from error
        yield names, all(delayed)


def _host(stack, bridge, name, number, kbit, delay_ms):
    """One namespace on the bridge; True where what it sends is delayed."""
    stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
    command("ip", "netns", "add", name)
    command("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
    command("ip", "link", "set", f"{name}v", "master", bridge, "up")
    command("ip", "-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        command("ip", "-n", name, "link", "set", device, "up")
    shaped = ("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root")
    try:
        command(*shaped, "netem", "delay", f"{delay_ms}ms", "rate", f"{kbit}kbit")
    except subprocess.CalledProcessError:
        command(*shaped, "tbf", "rate", f"{kbit}kbit", "burst", _PACKET, "latency", "2s")
        return False
    return True


def address(number):
    return f"10.213.77.{number + 1}"
