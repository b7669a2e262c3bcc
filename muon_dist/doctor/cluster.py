"""Checks between the machines of a job: one rank per machine exchanges messages with every other machine in turn.

They use gloo on the CPU, which can measure each link separately; NCCL gets one all-reduce over all ranks.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.doctor.verdict import Verdict

_PINGS = 8
_FIRST = 1 << 18  # bytes of the first message between two machines; its time decides the next size
_LARGEST = 1 << 26
_SECONDS = 0.25  # seconds that a message should take


def one_rank_a_host() -> tuple[list[int], list[str]]:
    """(the lowest rank of each machine, the machines' names), in the order of the ranks. A collective."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    first: dict[str, int] = {}
    for rank, name in enumerate(names):
        first.setdefault(name, rank)
    return list(first.values()), list(first)


def pairs(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each of `count` players meets another, until all have met (the circle method).

    In a round nobody plays twice, so all its games can run at the same time.
    """
    players: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        games = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(a, b) for a, b in games if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def link(peer: int, begins: bool, group: dist.ProcessGroup) -> dict[str, float]:
    """Round trip (seconds) and bandwidth (bytes per second) between this rank and `peer`; both call it."""
    token = torch.zeros(1)

    def exchange(message: torch.Tensor) -> None:
        if begins:
            dist.send(message, peer, group)
            dist.recv(token, peer, group)
        else:
            dist.recv(message, peer, group)
            dist.send(token, peer, group)

    trips = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        exchange(torch.zeros(1))
        trips.append(time.perf_counter() - began)
    size, trip = _FIRST, min(trips)
    while True:
        message = torch.zeros(size, dtype=torch.uint8)
        began = time.perf_counter()
        exchange(message)
        took = torch.tensor([max(1e-6, time.perf_counter() - began - trip)], dtype=torch.float64)
        # both use the clock of the rank that began
        if begins:
            dist.send(took, peer, group)
        else:
            dist.recv(took, peer, group)
        if took.item() >= _SECONDS / 2 or size == _LARGEST:
            return {"round_trip": trip, "bandwidth": size / took.item()}
        size = min(_LARGEST, max(2 * size, int(size * _SECONDS / took.item())))


def offset(peer: int, begins: bool, group: dist.ProcessGroup, clock: Callable[[], float] = time.time) -> float:
    """Seconds by which `peer`'s clock is ahead of this rank's. Both call it; only the rank that begins gets the
    result.

    As NTP does it (RFC 5905, section 8): of several exchanges the one with the shortest round trip counts.
    """
    best = (float("inf"), 0.0)
    for _ in range(_PINGS):
        theirs = torch.zeros(1, dtype=torch.float64)
        if not begins:
            dist.recv(theirs, peer, group)
            dist.send(torch.tensor([clock()], dtype=torch.float64), peer, group)
            continue
        sent = clock()
        dist.send(theirs, peer, group)
        dist.recv(theirs, peer, group)
        arrived = clock()
        best = min(best, (arrived - sent, theirs.item() - (sent + arrived) / 2))
    return best[1]


def measure_links(ranks: Sequence[int]) -> dict[tuple[int, int], dict[str, float]]:
    """(a, b) -> result of `link` between the a-th and b-th of `ranks`, on every rank. A collective."""
    group = dist.new_group(list(ranks), backend="gloo")
    found: dict[tuple[int, int], dict[str, float]] = {}
    for games in pairs(len(ranks)):
        for a, b in games:
            if dist.get_rank() == ranks[a]:
                found[a, b] = link(ranks[b], True, group)
            elif dist.get_rank() == ranks[b]:
                link(ranks[a], False, group)
    return _merged(found)


def measure_clocks(ranks: Sequence[int], clock: Callable[[], float] = time.time) -> dict[int, float]:
    """i -> seconds by which the clock of the i-th of `ranks` is ahead of the first one's, on every rank. A
    collective."""
    group = dist.new_group(list(ranks), backend="gloo")
    found: dict[int, float] = {}
    for i, rank in enumerate(ranks[1:], start=1):
        if dist.get_rank() == ranks[0]:
            found[i] = offset(rank, True, group, clock)
        elif dist.get_rank() == rank:
            offset(ranks[0], False, group, clock)
    return _merged(found)


def _merged(own: dict[Any, Any]) -> dict[Any, Any]:
    """The union of all ranks' entries."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def judge_links(found: Mapping[tuple[int, int], Mapping[str, float]], names: Sequence[str]) -> list[Verdict]:
    """Verdicts on the links: a link that is much slower than the others delays every step."""
    if not found:
        return [Verdict("links", "ok", "one machine: nothing to measure")]
    figures = {f"{names[a]} - {names[b]}": dict(values) for (a, b), values in found.items()}
    median = statistics.median(values["bandwidth"] for values in found.values())
    verdicts = []
    for (a, b), values in found.items():
        if values["bandwidth"] < median / 2:
            text = (
                f"{names[a]} - {names[b]}: {_gigabits(values['bandwidth'])}, the median is {_gigabits(median)}; "
                "every step waits for it"
            )
            fix = "compare with the other links of both machines: the machine that all slow links share has the fault"
            verdicts.append(Verdict("links", "warning", text, fix, figures=dict(values)))
    slowest = min(found.values(), key=lambda values: values["bandwidth"])
    if slowest["bandwidth"] * 8 < 1e9:
        text = (
            f"the slowest link has {_gigabits(slowest['bandwidth'])}: exchanges will take longer than the arithmetic"
        )
        fix = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the fastest interface; muon-dist plan shows the cost"
        verdicts.append(Verdict("links", "warning", text, fix, figures=figures))
    trip = max(values["round_trip"] for values in found.values())
    text = f"{len(found)} links, slowest {_gigabits(slowest['bandwidth'])}, longest round trip {trip * 1e3:.2f} ms"
    return verdicts or [Verdict("links", "ok", text, figures=figures)]


def _gigabits(bandwidth: float) -> str:
    return f"{bandwidth * 8 / 1e9:.3g} Gbit/s"


def judge_clocks(
    found: Mapping[int, float], names: Sequence[str], warn: float = 1.0, bad: float = 5.0
) -> list[Verdict]:
    """Verdicts on clocks. warn, bad: seconds.

    torchrun's c10d rendezvous compares the time stamps of heartbeats, written by each machine's own clock, and treats
    a machine as dead if its last heartbeat is older than 15 s (three intervals of 5 s; torch's dynamic_rendezvous.py).
    """
    far = {i: ahead for i, ahead in found.items() if abs(ahead) > warn}
    if not far:
        largest = max((abs(ahead) for ahead in found.values()), default=0.0)
        return [
            Verdict("clocks", "ok", f"within {largest * 1e3:.1f} ms", figures={names[i]: s for i, s in found.items()})
        ]
    return [
        Verdict(
            "clocks",
            "problem" if abs(ahead) > bad else "warning",
            f"{names[i]}'s clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {names[0]}'s; "
            "torchrun's rendezvous compares clocks to find dead machines",
            "synchronize the clocks (chronyd or systemd-timesyncd)",
            figures={names[i]: ahead},
        )
        for i, ahead in far.items()
    ]


def judge_versions(found: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> list[Verdict]:
    """Whether all machines have the same versions as the first one."""
    verdicts = []
    for name, versions in zip(names[1:], found[1:], strict=True):
        for package, version in versions.items():
            if version != found[0].get(package):
                text = f"{package} is {version} on {name} and {found[0].get(package)} on {names[0]}"
                fix = "install the same version everywhere, or use one environment on a shared file system"
                verdicts.append(Verdict("same versions", "problem", text, fix))
    return verdicts or [Verdict("same versions", "ok", f"on {len(names)} machines")]


def check_collective() -> list[Verdict]:
    """Verdict on one all-reduce over all ranks, on the GPUs if each rank has one: its result and time. A
    collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    devices = ["cpu"]
    if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config()):
        devices.append("cuda")
    verdicts = []
    for device in devices:
        values = torch.full((1 << 20,), float(rank + 1), device=device)
        dist.all_reduce(values.clone())  # the first all-reduce makes the connections
        began = time.perf_counter()
        dist.all_reduce(values)
        wrong = int((values != world * (world + 1) / 2).sum())  # waits for the GPU
        took = time.perf_counter() - began
        text = f"4 MiB summed over {world} ranks on {device} in {took * 1e3:.1f} ms"
        if wrong:
            fix = "a fault of the network or of a driver: try other machines, NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
            verdicts.append(Verdict("collective", "problem", f"{text}, {wrong} numbers wrong", fix))
        else:
            verdicts.append(Verdict("collective", "ok", text, figures={"seconds": took, "device": device}))
    return verdicts
