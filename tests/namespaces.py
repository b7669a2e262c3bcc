"""Several hosts on this machine, as network namespaces with their own addresses, names and links, which can be slowed
or cut.

    with hosts(3, rate="100mbit", delay="5ms") as (a, b, c):
        process = a.popen(["bash", "launch/torchrun.sh", ...], env=a.environment())
        b.limit(loss="1%")
        c.cut()

Every host has one network card, eth0, that a veth pair joins to a bridge. The bridge lives in a namespace of its own,
so that the machine's network is not touched. A host has its own name (gethostname), its own /etc/hosts with the names
of all, and its own mounts; files, processes and the clock are the machine's. It needs root, or unprivileged user
namespaces; `why_not()` says what is missing. When the context ends, or the process that opened it dies in any way, the
processes of the hosts are killed and the namespaces go.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUBNET = "10.77.0"
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
# Waits for the end of its standard input, which comes when the parent has died or closed it; then kills every process
# in the network namespaces named, again until none is left, and removes the folder.
_REAPER = """
import os, shutil, signal, sys
folder, spaces = sys.argv[1], set(sys.argv[2:])
sys.stdin.read()
for _ in range(50):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(pid) != os.getpid() and os.readlink(f"/proc/{pid}/ns/net") in spaces:
                os.kill(int(pid), signal.SIGKILL)
                found.append(pid)
        except OSError:
            pass
    if not found:
        break
    __import__("time").sleep(0.05)
shutil.rmtree(folder, ignore_errors=True)
"""


class _Namespace:
    """Network, mount and host-name namespaces, held open by a sleeping process that dies with this one's pipe."""

    def __init__(self, name: str, parent: _Namespace | None = None) -> None:
        # without root: one user namespace, made with the first and joined by the others, in which we are root
        self.user: bool = os.geteuid() != 0
        self.name = name
        user = ["--user", "--map-root-user"] if self.user and parent is None else []
        enter = parent.enter(net=False) if self.user and parent is not None else []
        # `cat` ends when the write end of the pipe closes, so a crash of this process leaves no holder behind
        read, self._pipe = os.pipe()
        self.holder = subprocess.Popen(
            [*enter, "unshare", *user, "--net", "--mount", "--uts", "--propagation", "private",
             "sh", "-c", 'hostname "$1" && ip link set lo up && echo ready && exec cat >/dev/null', "sh", name],
            stdin=read, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(read)
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if self.holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespace for {name}: {self.holder.stderr.read().strip()}")

    @property
    def pid(self) -> int:
        return self.holder.pid

    @property
    def identity(self) -> str:
        """The network namespace, as /proc/PID/ns/net names it."""
        return os.readlink(f"/proc/{self.pid}/ns/net")

    def enter(self, net: bool = True) -> list[str]:
        """The prefix of a command that runs in this namespace; `net` False: only in its user namespace."""
        user = ["--user", "--preserve-credentials"] if self.user else []
        spaces = ["--net", "--mount", "--uts"] if net else []
        return ["nsenter", "--target", str(self.pid), *user, *spaces]

    def run(self, *command: str) -> str:
        """Run a command in this namespace and return its output; RuntimeError with its error output if it fails."""
        done = subprocess.run([*self.enter(), *command], capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            raise RuntimeError(f"on {self.name}: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def close(self) -> None:
        os.close(self._pipe)
        self.holder.kill()
        self.holder.wait()


class Host:
    """One host; made by `hosts`."""

    def __init__(self, number: int, space: _Namespace, switch: _Namespace) -> None:
        self.name = space.name
        self.address = f"{SUBNET}.{number + 1}"
        self.interface = "eth0"
        self.space = space
        self._switch = switch
        self._port = f"port{number}"
        self._wire: subprocess.Popen[str] | None = None
        switch.run("ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(space.pid))
        switch.run("ip", "link", "set", self._port, "master", "switch", "up")
        space.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        space.run("ip", "link", "set", "eth0", "up")

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment without a launcher's variables, with this host's interface for gloo and NCCL."""
        of_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {key: value for key, value in os.environ.items() if key not in of_a_launcher}
        return {
            **kept,
            "VIRTUAL_ENV": sys.prefix,
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": self.interface,
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def popen(
        self, argv: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[Any]:
        """Start a program on this host, in a session of its own; further arguments are subprocess.Popen's.

        `env` is `environment()` unless given. The process is the program itself (no shell between), so that signals
        sent to it arrive.
        """
        folder = os.fspath(more.pop("cwd", os.getcwd()))
        command = [*self.space.enter(), "env", "-C", folder, *(os.fspath(word) for word in argv)]
        more.setdefault("stdin", subprocess.DEVNULL)
        more.setdefault("start_new_session", True)
        return subprocess.Popen(command, env=dict(env) if env is not None else self.environment(), **more)

    def run(self, *command: str) -> str:
        """Run a command on this host and return its output; RuntimeError when it fails."""
        return self.space.run(*command)

    def cut(self) -> None:
        """Pull the cable: packets are lost silently, connections stay half open."""
        self._switch.run("ip", "link", "set", self._port, "down")

    def restore(self) -> None:
        """Plug the cable in again."""
        self._switch.run("ip", "link", "set", self._port, "up")

    def limit(self, *, rate: str | None = None, delay: str | None = None, loss: str | None = None) -> None:
        """Limit this host's link in both directions, in tc's words ("100mbit", "5ms", "1%"); nothing given: no limit.

        `delay` is that of one direction of this link: the round trip to another host with the same limit is 4 of it.
        A frame is lost with probability `loss` in each direction.
        """
        self._lay_wire(_seconds(delay), _fraction(loss))
        for space, device in ((self.space, "eth0"), (self._switch, self._port)):
            if rate is not None:
                # a burst of two of the kernel's largest segments; a queue long enough that nothing is dropped in it
                shape = ("tbf", "rate", rate, "burst", "128kb", "limit", "16mb")
                space.run("tc", "qdisc", "replace", "dev", device, "root", *shape)
            elif "tbf" in space.run("tc", "qdisc", "show", "dev", device):
                space.run("tc", "qdisc", "del", "dev", device, "root")

    def _lay_wire(self, delay: float, loss: float) -> None:
        """Between port and bridge a process that delays and loses frames; delay and loss 0: none."""
        if self._wire is not None:
            self.close()
            self._wire = None
            # with its interfaces goes what the bridge has learned about who is behind them
            self._switch.run("ip", "link", "del", f"{self._port}near")
        near, far = f"{self._port}near", f"{self._port}far"
        if not delay and not loss:
            self._switch.run("ip", "link", "set", self._port, "master", "switch")
            return
        self._switch.run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        self._switch.run("ip", "link", "set", near, "up")
        self._switch.run("ip", "link", "set", far, "master", "switch", "up")
        self._switch.run("ip", "link", "set", self._port, "nomaster")
        wire = [sys.executable, "-S", str(Path(__file__).with_name("wire.py")), self._port, near]
        self._wire = subprocess.Popen(
            [*self._switch.enter(), *wire, str(delay), str(loss), self._port.removeprefix("port")],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._wire.stdout is not None and self._wire.stderr is not None
        if self._wire.stdout.readline() != "ready\n":
            raise RuntimeError(f"no wire for {self.name}: {self._wire.stderr.read().strip()}")

    def processes(self) -> list[int]:
        """Process ids on this host, but for the one that holds its namespaces."""
        here = self.space.identity
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if int(pid) != self.space.pid and os.readlink(f"/proc/{pid}/ns/net") == here:
                    found.append(int(pid))
            except OSError:
                continue
        return found

    def close(self) -> None:
        """End the wire, if there is one; `hosts` does it."""
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate()

    def kill(self) -> None:
        """End every process on the host at once, as a loss of power does."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _seconds(delay: str | None) -> float:
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    number, unit = re.fullmatch(r"([0-9.]+)(us|ms|s)", delay or "0s").groups()  # type: ignore[union-attr]
    return float(number) * units[unit]


def _fraction(loss: str | None) -> float:
    return float((loss or "0%").removesuffix("%")) / 100


@contextmanager
def hosts(
    n: int, *, rate: str | None = None, delay: str | None = None, loss: str | None = None
) -> Iterator[tuple[Host, ...]]:
    """`n` hosts named node0, node1, ... at 10.77.0.1, 10.77.0.2, ..., whose links may be limited (`Host.limit`)."""
    spaces: list[_Namespace] = []
    found: list[Host] = []
    reaper: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="muon-dist-hosts-", ignore_cleanup_errors=True) as folder:
        names = Path(folder) / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{i + 1} node{i}" for i in range(n))]
        names.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            switch = _Namespace("switch")
            spaces.append(switch)
            for i in range(n):
                spaces.append(_Namespace(f"node{i}", switch))
            reaper = subprocess.Popen(
                [sys.executable, "-S", "-c", _REAPER, folder, *(space.identity for space in spaces)],
                stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            switch.run("ip", "link", "add", "switch", "type", "bridge")
            switch.run("ip", "link", "set", "switch", "up")
            for i, space in enumerate(spaces[1:]):
                found.append(Host(i, space, switch))
            for host in found:
                host.run("mount", "--bind", str(names), "/etc/hosts")
                if rate or delay or loss:
                    host.limit(rate=rate, delay=delay, loss=loss)
            yield tuple(found)
        finally:
            if reaper is not None:
                assert reaper.stdin is not None
                reaper.stdin.close()
                reaper.wait(timeout=30)
            for host in found:
                host.close()
            for space in reversed(spaces):
                space.close()


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """The reason why `hosts` does not work here; None if two hosts with a limited link could be made."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"network namespaces: {', '.join(missing)} not found (Debian: apt-get install iproute2 util-linux)"
    try:
        with hosts(2, rate="1gbit", delay="1ms"):
            return None
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"network namespaces are not permitted here: {error}"
