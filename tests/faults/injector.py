"""Faults at named places: a rank kills or stops itself, sleeps, gets a signal, or finds its disk full.

Places are the events of `Progress` and `checkpoint.phases`; the package is not changed for this.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from muon_dist.checkpoint import LISTENERS, Phase
from muon_dist.exchange.progress import Progress

KINDS = ("kill", "stop", "signal", "delay", "full")


@dataclass(frozen=True)
class Fault:
    """One fault on one rank.

    Attributes:
        kind: "kill" (SIGKILL), "stop" (SIGSTOP), "signal" (SIGTERM to itself), "delay" (sleeps `seconds` each time),
            "full" (ENOSPC, of a save).
        operation: of `Progress`, or with `phase` not None ignored.
        step: finished optimizer steps at which it strikes; None: at every step.
        phase: number of a phase of a save on this rank, from 1 on.
    """

    kind: str
    rank: int
    operation: str = ""
    step: int | None = None
    phase: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is no fault: use one of {', '.join(KINDS)}")


class Injector:
    """Strikes on the rank and at the place of its fault.

    record: a file into which the time of the strike is written first, since a killed rank cannot tell.
    """

    def __init__(self, fault: Fault | None, rank: int, record: Path | None = None) -> None:
        self.fault = fault if fault is not None and fault.rank == rank else None
        self.record = record

    def watch(self, progress: Progress) -> None:
        """Listen to a rank's progress."""
        if self.fault is not None and self.fault.phase is None:
            progress.listeners.append(self._at_operation)

    def watch_saves(self) -> None:
        """Listen to the phases of saves."""
        if self.fault is not None and self.fault.phase is not None:
            LISTENERS.append(self._at_phase)

    def _at_operation(self, progress: Progress) -> None:
        if self.fault is None:
            return
        if progress.operation == self.fault.operation and self.fault.step in (None, progress.step):
            self._strike(f"{progress.operation} {progress.bucket}")

    def _at_phase(self, phase: Phase) -> None:
        if self.fault is None:
            return
        if phase.number == self.fault.phase:
            self._strike(f"{phase.name} {phase.path.name}")

    def _strike(self, place: str) -> None:
        fault = self.fault
        assert fault is not None
        if fault.kind == "signal":  # once: the second would end the process, as it should
            self.fault = None
        if self.record is not None:
            self.record.write_text(json.dumps({"time": time.time(), "place": place}))
        actions: dict[str, Callable[[], object]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
            "delay": lambda: time.sleep(fault.seconds),
            "full": _full,
        }
        actions[fault.kind]()


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def struck(record: Path) -> tuple[float, str] | None:
    """(time, place) of a strike, None when it never came."""
    if not record.exists():
        return None
    found = json.loads(record.read_text())
    return float(found["time"]), str(found["place"])
