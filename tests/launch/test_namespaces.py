"""The hosts of tests/namespaces.py are what they promise to be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.namespaces import Host, hosts

pytestmark = pytest.mark.namespaces

SERVE = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    peer, _ = server.accept()
    total = 0
    while data := peer.recv(65536):
        total += len(data)
    peer.sendall(str(total).encode())
    peer.close()
"""
SEND = """
import socket, sys, time
began = time.perf_counter()
peer = socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[3]))
met = time.perf_counter() - began
peer.sendall(bytes(int(sys.argv[2])))
peer.shutdown(socket.SHUT_WR)
print(socket.gethostname(), peer.recv(100).decode(), met, time.perf_counter() - began)
"""


@contextmanager
def serving(host: Host) -> Iterator[None]:
    """A server on the host that counts what it is sent."""
    process = host.popen([sys.executable, "-S", "-c", SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def send(host: Host, to: Host, size: int, patience: float = 30) -> tuple[float, float]:
    """Seconds until the connection stood, and until `size` bytes had arrived there."""
    printed = host.run(sys.executable, "-S", "-c", SEND, to.name, str(size), str(patience))
    name, arrived, met, took = printed.split()
    assert name == host.name and int(arrived) == size
    return float(met), float(took)


def test_links() -> None:
    """Rate, delay, loss, a cut and its repair, one after another on the same hosts."""
    size = 2_000_000
    with hosts(2) as (first, second), serving(second):
        assert quickest(first, second) < 0.03
        first.limit(rate="40mbit")
        _, took = send(first, second, size)
        assert took > 0.75 * size * 8 / 40e6, "a little less than the whole: a burst of 128 KiB is let through"
        first.limit(delay="30ms")
        met, _ = send(first, second, size)
        assert met > 0.058, "there and back over a link with 30 ms in each direction"
        first.limit(delay="1ms", loss="20%")
        assert send(first, second, 20_000)[1] > 0.004
        first.limit()
        assert quickest(first, second) < 0.03, "no delay is left"
        second.cut()
        with pytest.raises(RuntimeError, match="timed out"):
            send(first, second, size, patience=0.5)
        second.restore()
        send(first, second, size)


def quickest(host: Host, to: Host) -> float:
    """Seconds until a connection stands, of the quickest of several: the machine may be busy."""
    return min(send(host, to, 1000)[0] for _ in range(8))


def test_loss_is_what_was_asked_for() -> None:
    """Datagrams, which nobody repeats: 30% lost in one direction, all that arrive are whole."""
    receive = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 5001)); s.settimeout(2.0); n = 0\n"
        # room for all, since a busy machine reads late: SO_RCVBUFFORCE where it is allowed, else SO_RCVBUF
        "try: s.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)\n"
        "except OSError: s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)\n"
        "print('ready', flush=True)\n"
        "try:\n    while True: n += len(s.recv(2000)) == 1000\n"
        "except TimeoutError: print(n)"
    )
    shoot = (
        "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM)\n"
        "for i in range(2000): s.sendto(bytes(1000), ('node1', 5001)); i % 50 or time.sleep(0.002)"
    )
    with hosts(2) as (first, second):
        first.run("ip", "neigh", "replace", second.address, "lladdr", mac(second), "dev", "eth0")  # no lossy question
        first.limit(loss="30%")
        process = second.popen([sys.executable, "-S", "-c", receive], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        first.run(sys.executable, "-S", "-c", shoot)
        arrived = int(process.communicate(timeout=30)[0])
    assert 1250 < arrived < 1550, "1400 expected, standard deviation 20"


def mac(host: Host) -> str:
    found = re.search(r"link/ether (\S+)", host.run("ip", "link", "show", "eth0"))
    assert found is not None
    return found[1]


def test_power_loss_ends_every_process_of_one_host() -> None:
    with hosts(2) as (first, second):
        first.popen(["sh", "-c", "setsid sleep 60 & sleep 60"])
        survivor = second.popen(["sleep", "60"])
        while len(first.processes()) < 3:
            time.sleep(0.01)
        first.kill()
        while first.processes():
            time.sleep(0.01)
        assert survivor.poll() is None
    survivor.wait(timeout=10)


def test_nothing_is_left_after_a_crash(tmp_path: Path) -> None:
    """The process that opened the hosts is killed: their processes, names and folder go."""
    script = (
        "import os, sys, time\n"
        "from tests.namespaces import hosts\n"
        "with hosts(2, delay='1ms') as both:\n"
        "    print(both[0].popen(['sleep', '60']).pid, both[0].space.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as opener:
        assert opener.stdout is not None
        pids = [int(pid) for pid in opener.stdout.readline().split()]
        assert list(tmp_path.iterdir())
        os.kill(opener.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids) or list(tmp_path.iterdir()):
        assert time.monotonic() < deadline, "processes or the folder were left behind"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
