"""Points of the bar about checkpoints: killed saves, damage, full disks."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from muon_dist.checkpoint import LISTENERS, Phase, load, newest_good, open_checkpoint, tidy
from muon_dist.errors import CheckpointError
from tests.checkpoint.store import holding, ranks, save
from tests.faults.injector import Fault, Injector, struck
from tests.faults.processes import launch, succeeded
from tests.faults.table import Count

WORLD = 4


def _save(folder: str, step: int, shift: float) -> None:
    save(folder, step, shift)


def _phases(folder: str, step: int) -> int:
    """How many phases a save has on this rank."""
    passed: list[Phase] = []
    LISTENERS.append(passed.append)
    save(folder, step)
    return len(passed)


def _save_and_die(folder: str, step: int, shift: float, fault: Fault) -> None:
    here = ranks()
    Injector(fault, here.rank, Path(folder).parent / "strike.json").watch_saves()
    save(folder, step, shift)


def content(folder: Path) -> float | None:
    """Which save (its shift) the newest good commit holds, every element compared; None where it is none of them."""
    checkpoint = newest_good(folder, warn=lambda text: None)
    if checkpoint is None:
        return None
    held, tensors = holding(0, sharded=False)
    load(checkpoint, held)
    shift = (tensors["a"].view(-1)[0].item() - 1000 * 12) / 100_000
    wanted = holding(shift, sharded=False)[1]
    whole = all(torch.equal(tensors[n], wanted[n]) for n in wanted)
    return shift if whole else None


def _killed_saves(first: str, cases: list[tuple[int, int]], step: int) -> Count:
    """Commit 1, of the folder `first`, is there; a save of `step` is killed at (rank, phase): the old or the new one
    is found, whole."""
    out = Count()
    for rank, phase in cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoints"
            shutil.copytree(first, folder)
            outcomes = launch(_save_and_die, WORLD, str(folder), step, 2.0, Fault("kill", rank, phase=phase))
            strike = struck(Path(name) / "strike.json")
            found = content(folder)
            tidy(folder)
            clean = [p.name for p in folder.iterdir() if p.name.startswith(".")]
            after = content(folder)
            good = outcomes[rank].code == -9 and strike is not None and found in (1.0, 2.0) and after == found
            others = all(o.code not in (None, 0) or found == 2.0 for r, o in enumerate(outcomes) if r != rank)
            out.add(
                good and others and not clean,
                f"rank {rank} killed at phase {phase} ({strike}): exits {[o.code for o in outcomes]}, found {found}, "
                f"after tidying {after}, left {clean}",
            )
    return out


def _killed_at(step: int, count: int | None, seed: int) -> Count:
    """At each phase of a save on the first and on another rank, or at `count` of them."""
    with tempfile.TemporaryDirectory() as name:
        succeeded(launch(_save, WORLD, f"{name}/first", 1, 1.0))
        shutil.copytree(f"{name}/first", f"{name}/second")
        numbers = succeeded(launch(_phases, WORLD, f"{name}/second", step))
        cases = [(rank, phase) for rank in (0, 2) for phase in range(1, numbers[rank] + 1)]
        if count is not None and count < len(cases):
            cases = sorted(random.Random(seed).sample(cases, count))
        return _killed_saves(f"{name}/first", cases, step)


def boundaries(count: int | None, seed: int = 2) -> Count:
    """Point 2."""
    return _killed_at(2, count, seed)


def resaves(count: int, seed: int = 3) -> Count:
    """Point 3: the save that is killed replaces the commit of the same step."""
    return _killed_at(1, count, seed)


def damage(flips: int, truncations: int, seed: int = 4) -> Count:
    """Point 4: every damage is found by opening, which copies nothing, and the file is named."""
    out, chooser = Count(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        succeeded(launch(_save, WORLD, name, 3, 1.0))
        folder = Path(name) / "checkpoint-3"
        files = sorted(p for p in folder.rglob("*") if p.is_file())

        def judge(path: Path, what: str) -> None:
            try:
                open_checkpoint(folder)
                out.fail(f"{what} of {path.name} was not found")
            except CheckpointError as error:
                out.add(path.name in str(error), f"{what} of {path.name}: {error}")

        for case in range(flips + truncations):
            path = chooser.choice(files)
            whole = path.read_bytes()
            at = chooser.randrange(len(whole))
            changed = whole[:at] + bytes([whole[at] ^ (1 << chooser.randrange(8))]) + whole[at + 1 :]
            path.write_bytes(changed if case < flips else whole[:at])
            judge(path, f"byte {at}" if case < flips else f"truncation at {at}")
            path.write_bytes(whole)
        for path in files:
            whole = path.read_bytes()
            path.unlink()
            judge(path, "absence")
            path.write_bytes(whole)
        open_checkpoint(folder)
    return out


def _full_disk(folder: str, cases: list[tuple[int, int, str]]) -> list[tuple[bool, str]]:
    """In one life: saves that fail for ENOSPC at (rank, phase) under a policy, each followed by one that succeeds."""
    here, out = ranks(), []
    for number, (rank, phase, policy) in enumerate(cases):
        root = Path(folder) / str(number)
        save(root, 1, 1.0)
        passed = 0

        def full(entered: Phase, rank: int = rank, phase: int = phase) -> None:
            nonlocal passed
            passed += 1
            if here.rank == rank and passed == phase:
                raise OSError(28, "No space left on device")

        LISTENERS.append(full)
        raised = False
        try:
            save(root, 2, 2.0, on_error=policy, warn=lambda text: None)
        except CheckpointError as error:
            raised = "No space left on device" in str(error) and f"rank {rank}" in str(error)
        LISTENERS.clear()
        here.gather(None)  # the first rank has cleared away
        names = sorted(p.name for p in root.iterdir())
        here.gather(None)  # all have looked before the next save
        before = content(root)
        here.gather(None)
        save(root, 3, 3.0)
        after = content(root)
        kept = before == 1.0 and names == ["checkpoint-1"]
        good = kept and after == 3.0 and raised == (policy == "stop")
        out.append((good, f"rank {rank}, phase {phase}, {policy}: raised {raised}, {names}, {before}, then {after}"))
    return out


def full_disks(count: int, seed: int = 5) -> Count:
    """Point 5: the commit before loads, nothing is left lying about, and the policy decides."""
    with tempfile.TemporaryDirectory() as name:
        succeeded(launch(_save, WORLD, name, 1, 1.0))
        passed = succeeded(launch(_named_phases, WORLD, name, 2))
        # What comes after the rename is no part of the save any more.
        cases: list[Any] = [
            (rank, i + 1)
            for rank in range(WORLD)
            for i, phase in enumerate(passed[rank])
            if phase in ("write", "fsync", "make", "manifest", "written")
        ]
        chosen = random.Random(seed).sample(cases, min(count, len(cases)))
        policies = ["stop", "continue"]
        found = succeeded(
            launch(_full_disk, WORLD, f"{name}/full", [(*c, policies[i % 2]) for i, c in enumerate(chosen)])
        )
    out = Count()
    for rows in zip(*found, strict=True):
        out.add(all(good for good, _ in rows), rows[0][1])
    return out


def _named_phases(folder: str, step: int) -> list[str]:
    passed: list[str] = []
    LISTENERS.append(lambda phase: passed.append(phase.name))
    save(folder, step)
    return passed
