"""Addresses, interfaces and ports of this machine; no other machine is contacted."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from muon_dist.doctor.verdict import Level, Verdict

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_IFF_UP = 0x1


def addresses() -> dict[str, list[str]]:
    """Interface -> its addresses, for interfaces that are up."""
    found: dict[str, list[str]] = {}
    for _, name in socket.if_nameindex():
        flags = _flags(name)
        if flags is not None and not flags & _IFF_UP:
            continue
        found[name] = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                request = struct.pack("256s", name.encode()[:15])
                found[name].append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
            except OSError:  # the interface has no IPv4 address
                pass
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        digits, *_, name = line.split()
        if name in found:
            found[name].append(str(ipaddress.ip_address(bytes.fromhex(digits))))
    return found


def _flags(name: str) -> int | None:
    """Flags of an interface, or None; read from the kernel, because sysfs may show another network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8913, struct.pack("256s", name.encode()[:15]))  # SIOCGIFFLAGS
        except OSError:
            return None
    return int(struct.unpack("H", answer[16:18])[0])


def check_interfaces(
    variables: Mapping[str, str] = os.environ, found: Mapping[str, list[str]] | None = None
) -> list[Verdict]:
    """Checks the interfaces that gloo and NCCL are set to use, and finds public addresses on which a rendezvous would
    listen."""
    found = addresses() if found is None else found
    verdicts = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL accepts prefixes (eth), exact names (=eth0), exclusions (^lo) and lists of these
        wanted = variables.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        for name in wanted.lstrip("=").split(","):
            if not any(other == name if exact else other.startswith(name) for other in found):
                text = f"{variable} is {wanted}, but no such interface is up"
                verdicts.append(Verdict("interfaces", "problem", text, f"set it to one of {', '.join(found)}"))
    public = {
        name: [a for a in own if ipaddress.ip_address(a.partition("%")[0]).is_global] for name, own in found.items()
    }
    for name, own in public.items():
        if own:
            text = f"{name} has the public address {own[0]}: a rendezvous of torch.distributed would listen there"
            fix = "close the port to the outside (firewall), or start with a machine without a public address"
            verdicts.append(Verdict("interfaces", "warning", text, fix))
    shown = ", ".join(f"{name} {' '.join(own)}" for name, own in found.items() if own)
    return verdicts or [Verdict("interfaces", "ok", shown, figures={name: list(own) for name, own in found.items()})]


def check_hostname(name: str | None = None, several: bool = False) -> list[Verdict]:
    """The addresses of the machine's own name: gloo tells the other ranks to connect there unless an interface is set.

    several: whether the run will use other machines.
    """
    name = socket.gethostname() if name is None else name
    level: Level = "problem" if several else "warning"
    fix = f"give {name} its address in /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME to the interface"
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return [Verdict("host name", level, f"{name} resolves to no address: {error}", fix)]
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        text = f"{name} resolves to {', '.join(found)}: on other machines that is their own address"
        if not several:
            return [Verdict("host name", "ok", f"{text} (one machine: fine)")]
        return [Verdict("host name", level, text, fix)]
    return [Verdict("host name", "ok", f"{name} resolves to {', '.join(found)}")]


def check_port(port: int = 29500) -> list[Verdict]:
    """Whether a rendezvous could listen on the port."""
    family, any_address = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # as torch's store does, so that a connection closed a moment ago does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((any_address, port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            holder = _listener(port)
            who = f"by process {holder} ({_command(holder)})" if holder is not None else "by another process"
            text = f"{port} is taken {who}" if error.errno == errno.EADDRINUSE else f"{port} may not be used: {error}"
            fix = f"end that process, or choose another --master-port, such as {port + 1}"
            return [Verdict("port", "problem", text, fix, figures={"port": port, "process": holder})]
    return [Verdict("port", "ok", f"{port} is free", figures={"port": port})]


def _listener(port: int) -> int | None:
    """A process that listens on the port, among the processes that this user may inspect."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: listening
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) in inodes for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
