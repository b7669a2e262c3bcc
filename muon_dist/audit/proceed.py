"""One audited step: all ranks send, one rank recomputes, all ranks get the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muon_dist.audit.alarm import Alarm, Circumstances, Observed
from muon_dist.audit.collect import MatrixParts, SliceParts, cuts, exchange
from muon_dist.audit.follow import Changed, Follow
from muon_dist.audit.judge import Finding, judge
from muon_dist.audit.recompute import Before, Hyperparameters
from muon_dist.audit.settings import AuditSettings, number_of, other_rank
from muon_dist.audit.stages import length_alarm
from muon_dist.audit.tolerance import Precision
from muon_dist.audit.written import Written
from muon_dist.errors import AuditError
from muon_dist.numerics import compute_dtype
from muon_dist.optim.binding import Group
from muon_dist.optim.rules import RULES, MuonRule
from muon_dist.optim.runtime import Runtime

_STALE = "{0} not what the {1} had: stale after a load"
_ALONE = "the weight was changed between two steps and momentum was not: stale after a load, or another writes weights"
_TOUCHED = "momentum was changed between two steps, and not by the optimizer"


@dataclass
class MatrixAudit:
    """A Muon matrix that is audited in this step."""

    name: str
    parts: MatrixParts
    group: Group
    is_zero: bool

    def __post_init__(self) -> None:
        runtime, number = self.parts.runtime, self.parts.number
        self.factor = float(runtime.binding.gradient_factor())
        self.rates = [float(self.group[key]) for key in ("lr", "weight_decay", "momentum")]
        self.rule = RULES[self.group.get("rule", "muon")]
        rests = self.is_zero and number not in runtime.unmoved and not self.rule.shrinks_with_momentum
        self.rest = self.rates[2] ** (float(runtime.resting[number]) + 1) if rests else 1.0

    def asked(self) -> Hyperparameters:
        """The options of the step."""
        g = self.group
        return Hyperparameters(
            rule=self.rule.name, lr=self.rates[0], weight_decay=self.rates[1], momentum=self.rates[2],
            nesterov=bool(g["nesterov"]), ns_steps=g["ns_steps"], ns_schedule=g["ns_schedule"], scale=str(g["scale"]),
            transposed=self.parts.matrix.transposed, options=dict(g.get("rule_options") or {}),
            gradient_factor=self.factor, rest=self.rest,
            plain_momentum=type(self.rule).remember is MuonRule.remember,
        )  # fmt: skip

    def precision(self) -> Precision:
        """The dtypes of the step."""
        runtime, g = self.parts.runtime, self.group
        weight, options = self.parts.parameter.dtype, runtime.options
        return Precision(
            iteration=compute_dtype(g["ns_dtype"], runtime.binding.device, g["ns_schedule"]),
            weight=weight,
            wire=options.wire_dtype,
            stochastic=options.stochastic_rounding and weight == torch.bfloat16,
            rescaled=self.asked().rescales,
        )

    def auditor(self, messages: Sequence[Mapping[str, Any]], settings: AuditSettings) -> int | None:
        """The rank that recomputes."""
        return self.parts.auditor

    def message(self) -> dict[str, Any]:
        """Data that this rank sends to all others after the step."""
        self.sent = self.parts.finish()
        return {"sums": self.parts.sums, "rates": self.rates}

    def sizes(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Elements that each rank sends."""
        return [self.parts.sent_by(rank) for rank in range(len(messages))]

    def to_send(self, messages: Sequence[Mapping[str, Any]], settings: AuditSettings) -> list[Tensor]:
        """The tensors that this rank sends."""
        return self.sent

    def judge(
        self, received: list[Tensor], messages: Sequence[Mapping[str, Any]], around: Circumstances, copies: Any
    ) -> tuple[Finding, list[Alarm]]:
        """On the auditor: the finding and all alarms. copies: by rank with a different copy, its weight, flat."""
        before, momentum, weight, memory = self.parts.whole(received)
        seen = Observed(before, momentum, weight, memory)
        asked, precision = self.asked(), self.precision()
        around = replace(around, weights=cuts(self.parts.cover), momentum=cuts(self.parts.sources))
        finding = judge(seen, asked, precision, around)
        wrong = [self._copy(rank, flat, seen, finding, messages) for rank, flat in copies.items()]
        alarms = [alarm for alarm in wrong if alarm is not None]
        if copies and finding.alarms and len(alarms) < len(copies):  # the copies in the cover are wrong
            inside = tuple(sorted({int(r) for r in self.parts.cover.rank}))
            first = finding.alarms[0]
            said = f"only on rank {', '.join(map(str, inside))}: {first.sentence}"
            marked = (replace(first, sentence=said, ranks=inside), *finding.alarms[1:])
            finding = replace(finding, alarms=marked)
        return finding, alarms

    def _copy(
        self, rank: int, flat: Tensor, seen: Observed, finding: Finding, messages: Sequence[Mapping[str, Any]]
    ) -> Alarm | None:
        """The alarm for a copy that differs from the judged one; None if this copy is right."""
        step, asked = finding.wanted, self.asked()
        unequal = Alarm("copy", f"the copy of rank {rank} is not equal bit for bit", ("unequal",), ranks=(rank,))
        if step is None:
            return unequal
        old, update = (self.parts.on(rank, t) for t in (seen.before.weight, step.rate * step.direction))
        decay = self.parts.on(rank, step.decay) if isinstance(step.decay, Tensor) else step.decay
        w = Written.part(old, flat, update, decay, asked, self.precision(), finding.limit)
        if not w.wrong:
            return None if finding.alarms else unequal
        found = length_alarm(w, [])
        own = messages[rank]["rates"]
        if own != self.rates:
            said = f"rank {rank} stepped with lr, decay, momentum {own}, the auditor with {self.rates}"
            return Alarm("rate", said, ("wrong_rate",), 1 + w.b, 0.0, (rank,))
        if found is None:
            return Alarm("copy", f"the copy of rank {rank} is another", ("wrong_copy",), 1 + w.b, 0.0, (rank,))
        return replace(found, sentence=f"only on rank {rank}: {found.sentence}", ranks=(rank,))


@dataclass
class SliceAudit:
    """A part of an AdamW parameter that is audited in this step."""

    name: str
    parts: SliceParts
    group: Group
    state: Callable[[], Mapping[str, Tensor]]
    rotation: int

    def message(self) -> dict[str, Any]:
        """As `MatrixAudit.message`."""
        parts = self.parts
        self.sent = parts.finish(self.state())
        rates = [float(self.group[key]) for key in ("lr", "weight_decay")]
        wide = parts.dtype == torch.float64
        moments = str(self.state()["exp_avg"].dtype) if parts.length else ""
        steps = parts.steps if parts.length else 0.0
        weight = str(parts.work[1].dtype) if parts.work is not None and parts.length else ""
        return {"length": parts.length, "sums": parts.sums, "rates": rates, "wide": wide, "steps": steps,
                "dtypes": [weight, moments]}  # fmt: skip

    def holder(self, messages: Sequence[Mapping[str, Any]], settings: AuditSettings) -> int | None:
        """The rank whose part is audited; None if no rank has a part."""
        having = [rank for rank, m in enumerate(messages) if m["length"]]
        if not having:
            return None
        return having[(number_of(settings.seed, self.name) + self.rotation) % len(having)]

    def auditor(self, messages: Sequence[Mapping[str, Any]], settings: AuditSettings) -> int | None:
        """As `MatrixAudit.auditor`."""
        holder = self.holder(messages, settings)
        if holder is None:
            return None
        self.held_by = holder
        return other_rank(holder, len(messages), settings.seed, self.name, rotation=self.rotation)

    def sizes(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """As `MatrixAudit.sizes`."""
        return [7 * m["length"] if rank == self.held_by else 0 for rank, m in enumerate(messages)]

    def to_send(self, messages: Sequence[Mapping[str, Any]], settings: AuditSettings) -> list[Tensor]:
        """As `MatrixAudit.to_send`."""
        return self.sent

    def judge(
        self, received: list[Tensor], messages: Sequence[Mapping[str, Any]], around: Circumstances, copies: Any
    ) -> tuple[Finding, list[Alarm]]:
        """As `MatrixAudit.judge`."""
        told = messages[self.held_by]
        weight, gradient, first, second, after, first_after, second_after = received[self.held_by].chunk(7)
        steps = torch.tensor(told["steps"])
        before = Before(weight, gradient, first, {"exp_avg_sq": second, "step": steps})
        seen = Observed(before, first_after, after, {"exp_avg_sq": second_after})
        g = self.group
        asked = Hyperparameters(rule="adamw", lr=told["rates"][0], weight_decay=told["rates"][1],
                                betas=tuple(g["betas"]), eps=float(g["eps"]))  # fmt: skip
        written, moments = (getattr(torch, name.removeprefix("torch.")) for name in told["dtypes"])
        arithmetic = written if moments.itemsize < 4 else moments
        # A 16-bit parameter with fp32 moments was stepped in fp32 and then rounded stochastically.
        stochastic = written.itemsize < 4 <= moments.itemsize
        precision = Precision(torch.float32, written, moments, None, stochastic, arithmetic)
        return judge(seen, asked, precision, around), []

    def unequal(self, messages: Sequence[Mapping[str, Any]], columns: Sequence[int]) -> list[int]:
        """Ranks whose copy after the step differs from the audited rank's copy.

        columns: the layout's replica-group id per rank; empty without copies.
        """
        held = self.held_by
        copies = [r for r, m in enumerate(messages) if m["length"] and columns and columns[r] == columns[held]]
        return [rank for rank in copies if messages[rank]["sums"][1] != messages[held]["sums"][1]]


@dataclass
class Told:
    """Data that one rank sends to all others.

    Attributes:
        matrix, parameter: tensors that were changed between two steps on this rank.
        each: message of each audited tensor.
    """

    matrix: Changed
    parameter: Changed
    each: list[dict[str, Any]]


Audited = MatrixAudit | SliceAudit


def proceed(
    runtime: Runtime,
    audited: Sequence[Audited],
    settings: AuditSettings,
    follow: Follow,
    around: Sequence[Circumstances],
) -> list[dict[str, Any]]:
    """The line of each audited tensor, equal on all ranks; a collective.

    Args:
        follow: the samples recorded after the last step.
        around: facts that may explain a difference, per audited tensor.

    Raises:
        AuditError: the recomputation itself failed on one rank; raised on all ranks.
    """
    transport = runtime.transport
    transport.progress.enter("audit")
    told = transport.ranks.gather(
        Told(follow.matrix.changed(), follow.parameter.changed(), [a.message() for a in audited])
    )
    lines: list[tuple[int, Audited, int]] = []
    own: list[tuple[int, dict[str, Any]]] = []
    for n, a in enumerate(audited):
        messages = [t.each[n] for t in told]
        auditor = a.auditor(messages, settings)
        if auditor is None:
            continue
        dtype = a.parts.dtype if isinstance(a, MatrixAudit) else torch.float64 if any(
            m["wide"] for m in messages) else torch.float32  # fmt: skip
        parts: list[Sequence[Tensor]] = [()] * len(told)
        sizes = a.sizes(messages)
        parts[auditor] = a.to_send(messages, settings) if sizes[transport.rank] else ()
        received = exchange(transport, parts, sizes if transport.rank == auditor else [0] * len(told), dtype)
        copies = _copies(runtime, a, messages, auditor, dtype)
        if transport.rank == auditor:
            own.append((n, _judged(runtime, a, received, messages, around[n], copies)))
        lines.append((n, a, auditor))
    results = [dict(of_rank) for of_rank in transport.ranks.gather(own)]
    found: list[dict[str, Any]] = []
    for n, a, auditor in lines:
        line = results[auditor][n]
        if "failed" in line:
            raise AuditError(f"the audit of {a.name} failed on rank {auditor}: {line['failed']}")
        if isinstance(a, SliceAudit):
            line["alarms"] = [*_of_moments([t.parameter for t in told]), *line["alarms"]]
        elif not found:
            line["alarms"] = [*_between([t.matrix for t in told]), *line["alarms"]]
        found.append(line)
    return found


def _copies(
    runtime: Runtime, a: Audited, messages: Sequence[Mapping[str, Any]], auditor: int, dtype: torch.dtype
) -> dict[int, Tensor]:
    """Wrong copies by rank, on the auditor. A collective if any copy is wrong."""
    if not isinstance(a, MatrixAudit):
        return {}
    odd = a.parts.copies([m["sums"] for m in messages])
    if not odd:
        return {}
    parts: list[Sequence[Tensor]] = [()] * len(messages)
    if runtime.transport.rank in odd:
        parts[auditor] = a.parts.copy_of(runtime.transport.rank)
    sizes = [int(a.parts.held.length[a.parts.held.rank == r].sum()) if r in odd else 0 for r in range(len(messages))]
    here = runtime.transport.rank == auditor
    received = exchange(runtime.transport, parts, sizes if here else [0] * len(messages), dtype)
    return {rank: received[rank] for rank in odd} if here else {}


def _judged(
    runtime: Runtime, a: Audited, received: list[Tensor], messages: Sequence[Mapping[str, Any]], around: Circumstances,
    copies: dict[int, Tensor],
) -> dict[str, Any]:  # fmt: skip
    """The line of an audited tensor. It contains an error as text, because the other ranks wait for it."""
    try:
        finding, others = a.judge(received, messages, around, copies)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    alarms = [*finding.alarms, *others]
    if isinstance(a, SliceAudit) and (odd := a.unequal(messages, runtime.plan.layout.columns)):
        said = f"the copy of rank {', '.join(map(str, odd))} is another than that of rank {a.held_by}"
        alarms.append(Alarm("copy", said, ("wrong_copy",), ranks=tuple(odd)))
    matrix = isinstance(a, MatrixAudit)
    return {
        "matrix": a.name,
        "algorithm": "muon" if matrix else "adamw",
        "owner": a.parts.owner if isinstance(a, MatrixAudit) else a.held_by,
        "auditor": runtime.transport.rank,
        "errors": {name: value if math.isfinite(value) else None for name, value in finding.errors.items()},
        "tolerance": finding.tolerance,
        **({"only": finding.only} if finding.only else {}),
        "alarms": [alarm.plain() for alarm in alarms],
    }


def _between(changed: Sequence[Changed]) -> list[dict[str, Any]]:
    """The alarm for a matrix that was changed between two steps on any rank."""
    momentum = tuple(r for r, c in enumerate(changed) if "momentum" in c.of)
    weight = tuple(r for r, c in enumerate(changed) if "weight" in c.of)
    resumed = any(c.resumed for c in changed)
    if momentum and (resumed or not weight):
        sentence = _STALE.format("momentum is", "saved run") if resumed else _TOUCHED
        return [Alarm("momentum", sentence, ("stale_momentum",), ranks=momentum).plain()]
    if weight and not momentum:
        return [Alarm("momentum", _ALONE, ("stale_momentum",), ranks=weight).plain()]
    return []


def _of_moments(changed: Sequence[Changed]) -> list[dict[str, Any]]:
    """The alarm for AdamW's state that was changed between two steps on any rank."""
    ranks = tuple(r for r, c in enumerate(changed) if c.of)
    if not ranks:
        return []
    what = "AdamW's moments are" if any("moments" in c.of for c in changed) else "AdamW's count of steps is"
    resumed = any(c.resumed for c in changed)
    sentence = _STALE.format(what, "saved run" if resumed else "last step")
    return [Alarm("momentum", sentence, ("stale_momentum",), ranks=ranks).plain()]
