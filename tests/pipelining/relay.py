"""A link with a delay in user space, for kernels without netem: it carries packets between TUN devices.

Arguments: milliseconds of delay, kbit/s, names of devices; number n gets what is sent to addresses ending in n + 1.
"""

import fcntl
import heapq
import itertools
import os
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST = 65536


def device(name):
    """A new network device: what is sent over it is read from this file, what is written to the file it receives."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def target(packet):
    """The number of the host that an IPv4 packet goes to; None for other packets."""
    return packet[19] - 1 if packet[0] >> 4 == 4 else None


def relay(tuns, delay, rate):
    """For ever: packets leave each host one after the other at `rate` bytes a second, and arrive `delay` seconds on."""
    free, underway, order = [0.0] * len(tuns), [], itertools.count()
    while True:
        wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        for tun in select.select(tuns, [], [], wait)[0]:
            packet, source = os.read(tun, _LARGEST), tuns.index(tun)
            if target(packet) in range(len(tuns)):
                free[source] = max(time.monotonic(), free[source]) + len(packet) / rate
                heapq.heappush(underway, (free[source] + delay, next(order), tuns[target(packet)], packet))
        while underway and underway[0][0] <= time.monotonic():
            *_, tun, packet = heapq.heappop(underway)
            os.write(tun, packet)


def main(delay_ms, kbit, *names):
    tuns = [device(name) for name in names]
    # A link does not wait for a core.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    relay(tuns, float(delay_ms) * 1e-3, float(kbit) * 125)


if __name__ == "__main__":
    main(*sys.argv[1:])
