"""Points of the bar about runs: kills, stops, signals, spikes, flipped bits, slow ranks."""

from __future__ import annotations

import functools
import random
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import PeerError, ReplicaError, Stopped
from muon_dist.guards.replicas import ReplicaCheck
from tests.faults.injector import Fault, struck
from tests.faults.processes import launch, succeeded
from tests.faults.table import Count
from tests.faults.training import CPU, Life, Plan, live, operations, record

WORLD = 4
STEPS = 24
GROUP_TIMEOUT = 20.0
GRACE = 30.0  # seconds after a timeout within which all must have ended


class Reference:
    """The uninterrupted run: losses by step, digests of its commits."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        plan = Plan(str(folder), steps)
        self.operations: list[str] = succeeded(launch(operations, WORLD, plan))[0]
        results = succeeded(launch(live, WORLD, plan))
        self.last = results[0]["digest"]
        assert all(r["digest"] == self.last for r in results)
        lines = record(folder)
        self.losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "loss"}
        self.commits = {line["step"]: line["digest"] for line in lines if line["kind"] == "commit"}

    def differences(self, folder: Path) -> list[str]:
        """The differences of a run's record from this one."""
        found = []
        for line in record(folder):
            known = self.losses if line["kind"] == "loss" else self.commits
            # a commit at a step of its own (after a signal) is judged by the losses that follow
            if line["step"] in known and line.get("loss", line.get("digest")) != known[line["step"]]:
                found.append(f"{line['kind']} of step {line['step']} differs")
        return found


@functools.cache
def reference() -> Reference:
    """Made once a process."""
    with tempfile.TemporaryDirectory() as name:
        return Reference(Path(name))


class Chain:
    """A run in many processes, each ended by a fault, until its last step; then the next run."""

    def __init__(self, reference: Reference, folder: Path, seed: int) -> None:
        self.reference, self.folder = reference, folder
        self.random = random.Random(seed)
        self.number = self.at = 0
        self.count = Count()
        self._new()

    def _new(self) -> None:
        self.number += 1
        self.run = self.folder / f"run-{self.number}"
        self.run.mkdir()
        self.at = 0

    def strike(self, kind: str) -> None:
        """One more life, ended by a fault of a kind at a random place."""
        if self.at + 4 >= STEPS:
            self.finish()
            self._new()
        # most lives get past a commit, some die before their first
        step = self.at + self.random.randint(0 if self.random.random() < 0.2 else 2, 3)
        fault = Fault(kind, self.random.randrange(WORLD), self.random.choice(self.reference.operations), step)
        (self.run / "strike.json").unlink(missing_ok=True)
        outcomes = launch(live, WORLD, Plan(str(self.run), STEPS), fault, timeout=GROUP_TIMEOUT)
        found = struck(self.run / "strike.json")
        what = f"{kind} of rank {fault.rank} in {fault.operation}, step {step}"
        if found is None:
            self.count.fail(f"{what}: never came")
            return
        codes = [o.code for o in outcomes]
        late = max(o.ended for o in outcomes) - found[0]
        if kind == "kill":
            good = codes[fault.rank] == -signal.SIGKILL and all(c not in (0, None) for c in codes)
        else:
            good = codes == [Stopped.exit_code] * WORLD
        good = good and late <= GROUP_TIMEOUT + GRACE
        differences = self.reference.differences(self.run)
        self.count.add(good and not differences, f"{what}: exits {codes} after {late:.1f} s, {differences[:2]}")
        commits = [line["step"] for line in record(self.run) if line["kind"] == "commit"]
        self.at = commits[-1] if commits else 0

    def finish(self) -> None:
        """The last life of a run: it must end where the uninterrupted one ended."""
        results = succeeded(launch(live, WORLD, Plan(str(self.run), STEPS)))
        if any(r["digest"] != self.reference.last for r in results) or self.reference.differences(self.run):
            self.count.fail(f"run {self.number} ends elsewhere than the uninterrupted one")


def interrupted(kind: str, count: int, seed: int) -> Count:
    """`count` faults of a kind, over runs that are resumed each time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chain = Chain(reference(), folder, seed)
        for _ in range(count):
            chain.strike(kind)
        chain.finish()
        return chain.count


def kills(count: int, seed: int = 1) -> Count:
    """Point 1."""
    return interrupted("kill", count, seed)


def terminations(count: int, seed: int = 14) -> Count:
    """Point 14."""
    return interrupted("signal", count, seed)


def stops(count: int, seed: int = 13) -> Count:
    """Point 13: all other ranks name a stopped rank and their own operation, shortly after the watchdog's time."""
    watchdog, chooser, out = 1.5, random.Random(seed), Count()
    places = ["forward", "backward", "gradient flags", "momentum", "gather", "orthogonalize", "scatter", "update"]
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name:
            rank, step = chooser.randrange(WORLD), chooser.randint(2, 4)
            fault = Fault("stop", rank, chooser.choice(places), step)
            outcomes = launch(live, WORLD, Plan(name, STEPS, watchdog=watchdog), fault, timeout=GROUP_TIMEOUT)
            found = struck(Path(name) / "strike.json")
            others = [o for r, o in enumerate(outcomes) if r != rank]
            late = max(o.ended for o in others) - found[0] if found else float("inf")
            # In the step of the strike, or before the stopped rank is missed in the next.
            waits = rf"has been in [a-z ]+( of bucket \d+)? in step ({step + 1}|{step + 2}) for"
            # It publishes every tenth of a second, in which it may have come further.
            absent = rf"rank {rank} is absent: last seen in [a-z ]+( of bucket \d+)? in step [1-{step + 1}],"
            named = all(re.search(waits, o.error) and re.search(absent, o.error) for o in others)
            exits = all(o.code == PeerError.exit_code for o in others)
            out.add(
                named and exits and late <= watchdog + GRACE,
                f"stop of rank {rank} in {fault.operation}: exits {[o.code for o in outcomes]} after {late:.1f} s; "
                f"{others[0].error.strip().splitlines()[-1:]}",
            )
    return out


def spikes(count: int, seed: int = 9) -> Count:
    """Point 9: all ranks, and a run resumed at any commit, judge a spike on one rank in the same way."""
    out, chooser = Count(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        at = (9, 14, 15, 20)
        plan = Plan(name, STEPS, spike_at=at)
        whole = succeeded(launch(live, WORLD, plan))
        out.add(all(r["vetoed"] == list(at) and r["digest"] == whole[0]["digest"] for r in whole), "uninterrupted")
        for start in chooser.sample(range(2, STEPS, 2), min(count - 1, STEPS // 2 - 1)):
            later = succeeded(launch(live, WORLD, Plan(name, STEPS, spike_at=at, start=start)))
            wanted = [step for step in at if step >= start]
            same = all(r["vetoed"] == wanted and r["digest"] == whole[0]["digest"] for r in later)
            out.add(same, f"resumed at {start}: {[r['vetoed'] for r in later]}")
    return out


def _flips(folder: str, count: int, seed: int, interval: int) -> list[tuple[bool, str]]:
    """Flip a random bit of a random copy, train on for at most an interval, see what the comparison says, heal."""
    life = Life(Plan(folder, 0), None)
    named = [(n, p.detach()) for n, p in life.model.module.named_parameters()]
    check = ReplicaCheck(named, dist.group.WORLD, CPU)
    life.one_step()
    chooser, out = random.Random(seed), []
    for _ in range(count):
        rank, index = chooser.randrange(WORLD), chooser.randrange(len(named))
        name, tensor = named[index]
        position, before = chooser.randrange(tensor.numel() * 32), chooser.randrange(interval)
        if life.rank == rank:
            words = tensor.view(-1).view(torch.int32)
            flipped = 1 << position % 32
            words[position // 32] ^= flipped if flipped < 2**31 else -(2**31)
        said = "nothing"
        try:
            for _ in range(before):
                life.one_step()
                if not life.optimizer.guard.applied:  # NaN from a flipped exponent: compared at once, as Guards does
                    break
            check.check()
        except ReplicaError as error:
            said = str(error)
        good = bool(re.search(rf"{re.escape(name)}: rank {rank} differs from the others", said))
        if said == "nothing":  # rounded away by the updates
            copies = [torch.empty_like(tensor) for _ in range(WORLD)]
            dist.all_gather(copies, tensor.contiguous())
            good = all(torch.equal(c, copies[0]) for c in copies)
        out.append((good, f"bit {position % 32} of {name} on rank {rank}, {before} steps: {said[:200]}"))
        for _, value in named:
            dist.broadcast(value, (rank + 1) % WORLD)
    return out


def flips(count: int, seed: int = 11) -> Count:
    """Point 11: found within one interval of eight steps, parameter and rank named."""
    with tempfile.TemporaryDirectory() as name:
        found = succeeded(launch(_flips, WORLD, name, count, seed, 8))
    out = Count()
    for good, text in found[0]:
        out.add(good, text)
    return out


def stragglers(count: int, seed: int = 16) -> Count:
    """Point 16: `count` slow ranks, each named within 20 steps, and no false alarm in as many clean runs."""
    out, chooser = Count(), random.Random(seed)
    for _ in range(count):
        rank = chooser.randrange(WORLD)
        slow = Fault("delay", rank, chooser.choice(["data", "forward"]), seconds=0.2)
        for fault in (slow, None):
            with tempfile.TemporaryDirectory() as name:
                plan = Plan(name, 20 if fault else 40, save_every=100, stragglers=True)
                said: list[Any] = succeeded(launch(live, WORLD, plan, fault))[0]["said"]
            good = (len(said) == 1 and said[0][1].startswith(f"rank {rank} is slow")) if fault else not said
            out.add(good, f"{'slow rank ' + str(rank) if fault else 'clean run'}: {said}")
    return out
