"""Trainer callbacks that write data for a run's report: events, ownership, spectral measures."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from muon_dist.adapters.hf.flow import RunRecord
from muon_dist.audit.auditor import Audit
from muon_dist.audit.chain import FILE as AUDIT_FILE
from muon_dist.json_files import append_line, write_json
from muon_dist.numerics import newton_schulz_flops
from muon_dist.optim.diagnostics import Diagnostics
from muon_dist.optim.muon import Muon
from muon_dist.optim.unwrap import find_muon


def ownership(muon: Muon) -> dict[str, Any] | None:
    """Owners of the matrices, and the work and memory per rank; None before the first step of `muon`.

    `flops`: FLOPs of the iteration per step. `momentum`: fp32 elements of momentum on a rank.
    """
    plan = muon.plan
    if plan is None:
        return None
    steps_of = {
        spec.name: group["ns_steps"]
        for specs, group in zip(muon.specs, muon.param_groups, strict=True)
        for spec in specs
        if spec.matrices
    }
    matrices: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = [
        {"rank": r, "matrices": 0, "flops": 0, "momentum": 0} for r in range(plan.layout.world_size)
    ]
    for layout, owner, sources in zip(plan.layout.matrices, plan.owners, plan.sources, strict=True):
        m = layout.matrix
        sides = min(m.rows, m.cols), max(m.rows, m.cols)
        flops = newton_schulz_flops(*sides, steps_of[m.parameter])
        matrices.append({"name": m.name, "rows": m.rows, "cols": m.cols, "owner": owner, "flops": flops})
        loads[owner]["matrices"] += 1
        loads[owner]["flops"] += flops
        for f in sources:
            loads[f.rank]["momentum"] += f.length
    return {
        "layout": plan.layout.kind,
        "policy": plan.policy,
        "world_size": plan.layout.world_size,
        "matrices": matrices,
        "loads": loads,
    }


class OwnershipFile(RunRecord):
    """Writes `ownership` to a JSON file after the first step, on the first rank."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._done or not state.is_world_process_zero:
            return
        muon = find_muon(kwargs.get("optimizer"))
        plan = ownership(muon) if muon is not None else None
        self._done = plan is not None or muon is None
        if plan is not None:
            write_json(self.path, plan)


class EventsFile(RunRecord):
    """Appends the start, each checkpoint and the end of a run to a JSON-lines file, on the first rank.

    Each line: `time` (seconds since 1970), `event` ("started", "resumed", "checkpoint", "ended"), `step`. A resumed
    run keeps the earlier lines, so a reader can see the interruption.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _add(self, state: Any, event: str, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        time_now = round(time.time(), 3)
        append_line(self.path, {"time": time_now, "event": event, "step": state.global_step, **more})

    def begin_run(self, args: Any, state: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero:
            self.path.unlink(missing_ok=True)
        event = "resumed" if state.global_step else "started"
        self._add(state, event, world_size=args.world_size, steps=state.max_steps, process=os.getpid())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add(state, "checkpoint")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add(state, "ended")


class SpectraLog(RunRecord):
    """Sets the first step of a `Diagnostics`, and adds means of its measures to the log, such as `spectra/flatness`.

    The means are over the first rank's matrices only, because nothing is gathered.
    """

    def __init__(self, diagnostics: Diagnostics) -> None:
        self.diagnostics = diagnostics

    def begin_run(self, args: Any, state: Any) -> None:
        self.diagnostics.start(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs is not None and "loss" in logs:
            logs.update({f"spectra/{name}": value for name, value in self.diagnostics.means().items()})


class AuditStart(TrainerCallback):
    """Sets the first step of an `Audit`."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.audit.begin_at(state.global_step)


def take_watchers(
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None, folder: str | Path
) -> tuple[Any, Diagnostics | None, Audit | None]:
    """The arguments of a factory, with `diagnostics` and `audit` converted to objects, and these two objects.

    folder: default folder of the audit's file.
    """
    if optimizer_cls_and_kwargs is None:
        return None, None, None
    factory, chosen = optimizer_cls_and_kwargs
    diagnostics, audit = chosen.get("diagnostics"), chosen.get("audit")
    if isinstance(diagnostics, Mapping):
        diagnostics = Diagnostics(**diagnostics)
        chosen = {**chosen, "diagnostics": diagnostics}
    if isinstance(audit, Mapping):
        audit = Audit({"path": Path(folder) / AUDIT_FILE, **audit})
        chosen = {**chosen, "audit": audit}
    return (factory, chosen), diagnostics, audit
