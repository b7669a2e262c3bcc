"""A wire between two network interfaces that delays and loses frames; `tests/namespaces.py` starts it.

    python wire.py FIRST SECOND DELAY_SECONDS LOSS_FRACTION SEED

The kernel's netem does the same and is left out of many kernels. Frames travel with their virtio header, so that large
segments and unfinished checksums, which veth hands over as they are, stay valid: a few copies of 64 KiB a megabyte.
Prints "ready" when it forwards; runs until killed.
"""

from __future__ import annotations

import random
import selectors
import socket
import sys
import time
from collections import deque

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
LARGEST = 10 + 14 + 4 + 65536  # virtio header, Ethernet header, VLAN tag, the largest segment
QUEUE = 64 << 20  # bytes


def attach(interface: str) -> socket.socket:
    """A raw socket that sees the frames which arrive at the interface, and none that we send out of it."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    wire.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    try:
        wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
    except PermissionError:  # in a user namespace the system's bound holds
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE)
    wire.bind((interface, ETH_P_ALL))
    wire.setblocking(False)
    return wire


def forward(first: socket.socket, second: socket.socket, delay: float, loss: float, seed: int) -> None:
    """Carry every frame to the other side `delay` seconds later; each is lost with probability `loss`. Never ends."""
    dice = random.Random(seed)
    selector = selectors.DefaultSelector()
    selector.register(first, selectors.EVENT_READ, second)
    selector.register(second, selectors.EVENT_READ, first)
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()  # in order of time, because the delay is constant
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in selector.select(patience):
            source = key.fileobj
            assert isinstance(source, socket.socket)
            try:
                while True:
                    frame = source.recv(LARGEST)
                    if dice.random() >= loss:
                        waiting.append((time.monotonic() + delay, key.data, frame))
            except OSError:  # nothing more to read, or the interface went down for a while
                pass
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            try:
                target.send(frame)
            except OSError:  # a cut link or a full queue: the frame is lost, as on a real wire
                pass


if __name__ == "__main__":
    sides = attach(sys.argv[1]), attach(sys.argv[2])
    print("ready", flush=True)
    forward(*sides, float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
