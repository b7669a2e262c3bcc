"""`Audit`: follows an optimizer, and lets another rank recompute one of its matrices every few steps."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muon_dist.audit.alarm import Alarm, Circumstances
from muon_dist.audit.chain import Chain
from muon_dist.audit.collect import MatrixParts, SliceParts
from muon_dist.audit.follow import Follow, of_matrix, of_parameter
from muon_dist.audit.proceed import Audited, MatrixAudit, SliceAudit, proceed
from muon_dist.audit.settings import AuditSettings, in_rotation, number_of, other_rank
from muon_dist.audit.undo import Undo
from muon_dist.errors import AuditError
from muon_dist.optim.adamw import AdamWork
from muon_dist.optim.runtime import Runtime, Work

_RATES_KEPT = 4


@dataclass
class Call:
    """The audit of one call of the optimizer's step.

    Attributes:
        work: Muon's work by buffer.
        adamw: AdamW's work by group.
        present: all parameters of this call with their group's index, with or without a gradient.
        zero: matrices whose gradient is exactly zero.
        audited: the tensors that are audited in this call.
    """

    work: dict[int, Work]
    adamw: dict[int, list[AdamWork]]
    present: Sequence[tuple[int, Tensor]]
    zero: Set[int]
    audited: list[Audited] = field(default_factory=list)


class Audit:
    """Recomputes some of an optimizer's steps on other ranks, and writes a chain of the results.

    It does not change the steps. Between audited steps it needs a few operations on 64 elements; an audited step sends
    the parts of one matrix to one rank.

    Args:
        settings: see `AuditSettings`; or its fields as a mapping.

    Attributes:
        step: number of optimizer steps since the beginning of the run.
        latest: the newest line of each matrix, by name.
        alarms: number of lines with an alarm since this process began.
        undone: number of steps that were undone since this process began.
        chain: the written chain.
        bytes_sent: bytes that this rank has sent for the audit since this process began.
        seconds: time that the host has spent on the audit, including waiting for other ranks.
    """

    def __init__(self, settings: AuditSettings | Mapping[str, Any]) -> None:
        self.settings = settings if isinstance(settings, AuditSettings) else AuditSettings.of(settings)
        self.step = self.undone = self.bytes_sent = 0
        self.seconds = 0.0
        self.latest: dict[str, dict[str, Any]] = {}
        self.alarms: list[dict[str, Any]] = []
        self.follow = Follow()
        self.chain = Chain()
        self._begun = False
        self._offset: int | None = None
        self._resumed: tuple[str, int] | None = None
        self._undo: Undo | None = None
        self._followed: tuple[int, Tensor | None] = (-1, None)  # the next audited AdamW parameter
        self._rates: deque[dict[int, float]] = deque(maxlen=_RATES_KEPT)

    def before(
        self,
        optimizer: Any,
        work: dict[int, Work],
        adamw: dict[int, list[AdamWork]],
        present: Sequence[tuple[int, Tensor]],
        zero: Set[int],
        rates: Sequence[float],
    ) -> Call:
        """Called at the beginning of a call of the optimizer's step; returns the data for `after`. See `Call`.

        rates: lr, weight decay and momentum of each group of this call.
        """
        began = time.perf_counter()
        runtime, call = optimizer.runtime, Call(work, adamw, present, zero)
        step = self._step_of(runtime)
        if step != self.step:
            self.step = step
            self._undo = Undo() if self._due and self.settings.on_alarm == "undo" else None
            self._rates.append({})
        self._rates[-1].update(zip(dict.fromkeys(index for index, _ in present), rates[::3], strict=False))
        self._track(optimizer, call)
        if self._due:
            if self._undo is not None:
                self._undo.keep(runtime, work, adamw, optimizer.state)
            call.audited = [*self._matrices(runtime, call), *self._parameter(optimizer, call)]
        self.seconds += time.perf_counter() - began
        return call

    def after(self, optimizer: Any, call: Call) -> None:
        """Called at the end of a call; a collective if a tensor is audited.

        Raises:
            AuditError: with `on_alarm="stop"`, on all ranks.
        """
        began = time.perf_counter()
        runtime, taken_back = optimizer.runtime, False
        if call.audited:
            self._begin(runtime)
            sent = runtime.transport.bytes_sent
            around = [self._circumstances(optimizer, audited) for audited in call.audited]
            lines = proceed(runtime, call.audited, self.settings, self.follow, around)
            self.bytes_sent += runtime.transport.bytes_sent - sent
            taken_back = self._note(runtime, lines)
        if taken_back:
            optimizer.guard.applied = False  # further calls in this step are skipped too
            self.follow.forget()
        else:
            self._go_on(optimizer, call)
        self.seconds += time.perf_counter() - began

    def _track(self, optimizer: Any, call: Call) -> None:
        """Compare the next audited tensors with their values after the last step."""
        runtime, follow = optimizer.runtime, self.follow
        follow.matrix.before(of_matrix(runtime, call.work, follow.matrix.number) or {})
        number = follow.parameter.number
        if self._followed[0] != number:  # in a resumed run
            self._followed = number, dict(enumerate(p for _, p in _of_adamw(optimizer))).get(number)
        now = of_parameter(runtime.binding, call.adamw, optimizer.state, self._followed[1])
        follow.parameter.before(now or {})

    def _go_on(self, optimizer: Any, call: Call) -> None:
        """Record the values of the next audited tensors after this step."""
        runtime, step = optimizer.runtime, (self.step // self.settings.every + 1) * self.settings.every
        number = in_rotation(self.settings.seed, len(runtime.plan.layout.matrices), self._turn(step))[0]
        self.follow.matrix.after(number, of_matrix(runtime, call.work, number))
        if (self._due or self._followed[1] is None) and (named := _of_adamw(optimizer)):
            index = self._next_parameter(step, len(named))[0]
            self._followed = index, named[index][1]
        now = of_parameter(runtime.binding, call.adamw, optimizer.state, self._followed[1])
        self.follow.parameter.after(self._followed[0], now)

    def _circumstances(self, optimizer: Any, audited: Audited) -> Circumstances:
        """Facts that may explain a wrong step of a tensor, such as the rates of other steps and groups."""
        own = next(i for i, group in enumerate(optimizer._groups) if group is audited.group)
        *before, now = self._rates
        earlier = [rates[own] for rates in reversed(before) if own in rates]
        others = [lr for index, lr in now.items() if index != own]
        return Circumstances(earlier, others, optimizer.runtime.transport.world_size, self.settings.tolerance)

    def _step_of(self, runtime: Runtime) -> int:
        """Number of the current step. Steps that were skipped because of their gradients count too."""
        made = runtime.transport.progress.step
        if self._offset is None:
            self._offset = self.step - made
        return self._offset + made + 1

    @property
    def _due(self) -> bool:
        return self.step % self.settings.every == 0

    # Choice ---------------------------------------------------------------------------------------------------------

    def _turn(self, step: int) -> int:
        return (step // self.settings.every - 1) * self.settings.matrices

    def _next_parameter(self, step: int, count: int) -> tuple[int, int]:
        """(index, rotation) of the AdamW parameter to audit in a step."""
        return in_rotation(number_of(self.settings.seed, "adamw"), count, step // self.settings.every - 1)

    def _matrices(self, runtime: Runtime, call: Call) -> list[Audited]:
        layouts, world, seed = runtime.plan.layout.matrices, runtime.transport.world_size, self.settings.seed
        found: list[Audited] = []
        for turn in range(self._turn(self.step), self._turn(self.step) + self.settings.matrices):
            number, rotation = in_rotation(seed, len(layouts), turn)
            held = layouts[number]
            if held.buffer not in call.work or any(a.name == held.matrix.name for a in found):
                continue
            owner = int(runtime.plan.owners[number])
            auditor = other_rank(owner, world, seed, held.matrix.name, rotation=rotation)
            w = call.work[held.buffer]
            parts = MatrixParts(runtime, number, auditor, w.parameter, w.gradient)
            found.append(MatrixAudit(held.matrix.name, parts, w.group, number in call.zero))
        return found

    def _parameter(self, optimizer: Any, call: Call) -> list[Audited]:
        """One AdamW parameter, if it is stepped in this call; the same one on all ranks."""
        named = _of_adamw(optimizer)
        if not named:
            return []
        index, rotation = self._next_parameter(self.step, len(named))
        name, parameter = named[index]
        groups = [g for g, p in call.present if p is parameter]
        if not groups:
            return []
        place = number_of(self.settings.seed, self.step, name)
        binding, state = optimizer.runtime.binding, optimizer.state
        work = next((item for item in call.adamw.get(groups[0], ()) if item[0] is parameter), None)
        parts = SliceParts(work, state.get(parameter, {}), binding.local, lambda n: place % n, binding.device)
        group = optimizer._groups[groups[0]]
        return [SliceAudit(name, parts, group, lambda: state.get(parameter, {}), rotation)]

    # Result ---------------------------------------------------------------------------------------------------------

    def _begin(self, runtime: Runtime) -> None:
        """Write the first line of this process."""
        if self._begun:
            return
        self._begun = True
        self.chain = Chain(self.settings.path, writes=runtime.transport.rank == 0)
        names = [m.matrix.name for m in runtime.plan.layout.matrices]
        settings = {"every": self.settings.every, "matrices": self.settings.matrices, "seed": self.settings.seed}
        layout = {"layout": runtime.plan.layout.kind, "world_size": runtime.transport.world_size}
        first = {"step": self.step, **settings, **layout, "names": names}
        self.chain.start(first, *(self._resumed or ()))

    def _note(self, runtime: Runtime, lines: Sequence[dict[str, Any]]) -> bool:
        """Write the lines and act on an alarm. Returns whether the step was undone."""
        texts = []
        for line in lines:
            undone = bool(line["alarms"]) and self._undo is not None
            record = {"kind": "audit", "step": self.step, **line, **({"undone": True} if undone else {})}
            written = self.chain.append(record)
            self.latest[line["matrix"]] = written
            if line["alarms"]:
                self.alarms.append(written)
                texts.append(f"{line['matrix']}: {sentence(line['alarms'])}")
        if not texts:
            return False
        text = f"audit of step {self.step}: {'; '.join(texts)}"
        if self.settings.on_alarm == "stop":
            error = AuditError(f"{text}. The step was applied: continue from the last checkpoint before it")
            error.reported_elsewhere = runtime.transport.rank != 0
            raise error
        if self._undo is not None:
            self._undo.restore()
            self.undone += 1
            text += ". The step was undone"
        if runtime.transport.rank == 0:
            warnings.warn(text, RuntimeWarning, stacklevel=5)
        return self._undo is not None

    # State ----------------------------------------------------------------------------------------------------------

    def begin_at(self, step: int) -> None:
        """Set the number of finished steps: the next optimizer step is `step + 1`."""
        self.step, self._offset = step, None

    def forget(self) -> None:
        """Call this after the optimizer's state was loaded: the next step does not compare it with recorded values."""
        self.follow.forget()

    def forget_weights(self) -> None:
        """Call this after other code has changed weights: the next step compares only momentum and moments."""
        self.follow.matrix.forget("weight")

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: step number, and digest and length of the chain; equal on all ranks."""
        if not self._begun and self._resumed is not None:
            return {"step": self.step, "head": self._resumed[0], "lines": self._resumed[1]}
        return {"step": self.step, "head": self.chain.head, "lines": self.chain.lines}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the chain of a saved run."""
        self.begin_at(int(state["step"]))
        self._begun = False
        self._resumed = (str(state["head"]), int(state["lines"]))


def _of_adamw(optimizer: Any) -> list[tuple[str, Tensor]]:
    """Name and tensor of all AdamW parameters, in the same order on all ranks."""
    return [(name, p) for name, p, kind in optimizer._named() if kind == "adamw" and p.is_floating_point()]


def sentence(alarms: Sequence[Mapping[str, Any] | Alarm]) -> str:
    """Text of all alarms of one matrix, first stage first: "decay: weight decay was not applied; also rate: ..."."""
    plain = [a.plain() if isinstance(a, Alarm) else a for a in alarms]
    said = [f"{a['stage']}: {a['sentence']}" for a in plain]
    return "; also ".join(said)
