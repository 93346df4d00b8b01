"""A link between two TUN devices that delays, limits, drops and stalls packets as it is told: netem in user space, for
kernels without it.

    slow_link.py DEVICE DEVICE

It makes both devices and prints "ready"; they may then be moved into other network namespaces. Each line of standard
input is a JSON object that sets some of: delay_ms (each way), rate_mbit (each way, 0: none), loss (0 to 1), stall
(true: packets wait until it is false). It ends with standard input.
"""

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MOST_WAITING = 4000


def tun(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def main():
    a, b = tun(sys.argv[1]), tun(sys.argv[2])
    other = {a: b, b: a}
    how = {"delay_ms": 0, "rate_mbit": 0, "loss": 0, "stall": False}
    chance = random.Random(7)
    free_at = {a: 0.0, b: 0.0}
    waiting, number = [], 0
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now and not how["stall"]:
            _, _, to, packet = heapq.heappop(waiting)
            try:
                os.write(to, packet)
            except OSError:
                pass  # The device is down, as a cable that was pulled: the packet is lost.
        pause = None
        if waiting and not how["stall"]:
            pause = max(0, waiting[0][0] - time.monotonic())
        readable, _, _ = select.select([a, b, 0], [], [], pause)
        for fd in readable:
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                how.update(json.loads(line))
                continue
            for _ in range(64):
                try:
                    packet = os.read(fd, 65536)
                except OSError:
                    break
                if len(waiting) >= MOST_WAITING or chance.random() < how["loss"]:
                    continue
                now = time.monotonic()
                due = max(now, free_at[fd])
                if how["rate_mbit"]:
                    due += len(packet) / (how["rate_mbit"] * 125_000)
                    free_at[fd] = due
                number += 1
                heapq.heappush(waiting, (due + how["delay_ms"] / 1000, number, other[fd], packet))


main()
