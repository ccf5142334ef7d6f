"""Hosts on one machine: network namespaces, and links between them with the bandwidth and delay of real ones."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

RELAY = Path(__file__).parent / "relay.py"
# A packet of Ethernet and its headers: the least that the shaper lets through at once.
_PACKET, _MTU = 1600, 1500


class NotPermitted(Exception):
    """Namespaces cannot be made here: why."""


def command(*words):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout


def address(host, link=0):
    return f"10.213.{77 + link}.{host + 1}"


@contextlib.contextmanager
def hosts(count, links):
    """Names of namespaces, joined by `links`: kbit/s and milliseconds of delay of what a host sends.

    A link without a delay is shaped by the kernel (tbf), one with a delay too where it has netem. Elsewhere a process
    carries the packets from one host's TUN device to another's.

    Raises:
      NotPermitted: it takes root, and the commands ip and tc.
    """
    for name in ("ip", "tc"):
        if shutil.which(name) is None:
            raise NotPermitted(f"the command {name} is not here")
    prefix = f"jx{os.getpid() % 100000}"
    names = [f"{prefix}n{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
                command("ip", "netns", "add", name)
                command("ip", "-n", name, "link", "set", "lo", "up")
            for number, (kbit, delay_ms) in enumerate(links):
                join = _bridged if not delay_ms or _has_netem(names[0]) else _relayed
                join(stack, names, f"{prefix}{number}", kbit, delay_ms)
                for host, name in enumerate(names):
                    device = f"{prefix}{number}h{host}"
                    command("ip", "-n", name, "addr", "add", f"{address(host, number)}/24", "dev", device)
                    command("ip", "-n", name, "link", "set", device, "mtu", _MTU, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            raise NotPermitted(f"network namespaces and links cannot be made: {reason.strip()}") from error
        yield names


def _has_netem(name):
    try:
        command("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms")
    except subprocess.CalledProcessError:
        return False
    command("tc", "-n", name, "qdisc", "del", "dev", "lo", "root")
    return True


def _bridged(stack, names, link, kbit, delay_ms):
    """A device in each namespace, {link}h0 and so on, joined by a bridge and shaped by the kernel."""
    bridge = f"{link}b"
    stack.callback(subprocess.run, ["ip", "link", "del", bridge], capture_output=True)
    command("ip", "link", "add", bridge, "type", "bridge")
    command("ip", "link", "set", bridge, "up")
    for host, name in enumerate(names):
        device = f"{link}h{host}"
        command("ip", "link", "add", f"{link}v{host}", "type", "veth", "peer", "name", device, "netns", name)
        command("ip", "link", "set", f"{link}v{host}", "master", bridge, "up")
        shaped = ("tc", "-n", name, "qdisc", "add", "dev", device, "root")
        if delay_ms:
            command(*shaped, "netem", "delay", f"{delay_ms}ms", "rate", f"{kbit}kbit")
        else:
            command(*shaped, "tbf", "rate", f"{kbit}kbit", "burst", _PACKET, "latency", "2s")


def _relayed(stack, names, link, kbit, delay_ms):
    """The same devices, joined by a process that delays and paces packets."""
    devices = [f"{link}h{host}" for host in range(len(names))]
    words = [sys.executable, "-I", str(RELAY), str(delay_ms), str(kbit), *devices]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stack.callback(process.communicate)
    stack.callback(process.kill)
    if process.stdout.readline() != "ready\n":
        raise OSError(process.communicate()[1].strip().splitlines()[-1])
    for device, name in zip(devices, names, strict=True):
        command("ip", "link", "set", device, "netns", name)
