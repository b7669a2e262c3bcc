"""Makes a failing case smaller: removes parts while it still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from muon_dist.fuzz.case import DDP, FSDP2, ZERO, Case, Parameter, Setup
from muon_dist.fuzz.judge import WRONG, Outcome

_OPTIONS = (
    "rule", "lr", "weight_decay", "momentum", "nesterov", "scale", "rule_options", "ns_steps", "ns_rows",
    "momentum_everywhere", "audit", "by_pattern", "bucket_mb", "overlap", "wire",
    "owner_policy", "accumulation", "clip", "clip_muon", "zero", "missing",
)  # fmt: skip


def shrink(case: Case, outcome: Outcome, run: Callable[[Case], Outcome], seconds: float) -> tuple[Case, Outcome]:
    """The smallest case found that is still wrong, and its outcome.

    Args:
        run: judges a case.
        seconds: after this time no further case is begun.
    """
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for smaller in candidates(case):
            if time.monotonic() > end:
                break
            if smaller.problem() is not None:
                continue
            found = run(smaller)
            if found.kind == WRONG:
                case, outcome, progress = smaller, found, True
                break
    return case, outcome


def candidates(case: Case) -> Iterator[Case]:
    """Cases with one part removed, the largest parts first."""
    if case.resume is not None:
        yield replace(case, resume=None)
    yield from (case.shortened(steps) for steps in sorted({1, case.steps // 2, case.steps - 1}) if steps < case.steps)
    for p in case.parameters:
        yield case.without(p.name)
    for setup in _smaller(case.setup):
        resume = case.resume
        if resume is not None and resume.setup == case.setup:
            resume = replace(resume, setup=setup)
        yield replace(case, setup=setup, resume=resume)
    if case.resume is not None and case.resume.how != "reload":
        yield from (replace(case, resume=replace(case.resume, setup=s)) for s in _smaller(case.resume.setup))
    if case.dtype != "float32":
        yield replace(case, dtype="float32", rounding=None)
    defaults: dict[str, Any] = {f.name: f.default for f in fields(Case)}
    for name in _OPTIONS:
        if getattr(case, name) != defaults[name]:
            yield replace(case, **{name: defaults[name]})
    for i, p in enumerate(case.parameters):
        for simpler in _simpler(p):
            yield replace(case, parameters=(*case.parameters[:i], simpler, *case.parameters[i + 1 :]))


def _smaller(setup: Setup) -> Iterator[Setup]:
    if setup.world > 1:
        yield Setup()
    if setup.framework in (ZERO, FSDP2) and setup.world > 2:
        yield Setup(DDP, replicate=2)
    for axis in ("replicate", "shard", "tp", "sp", "ep"):
        size = getattr(setup, axis)
        for less in (1, 2):
            if less < size:
                changed: dict[str, Any] = {axis: less}
                smaller = replace(setup, **changed)
                meaningful = setup.framework != FSDP2 or (smaller.shard > 1 or smaller.replicate == 1 < smaller.tp)
                if meaningful and (setup.framework != DDP or smaller.replicate > 1):
                    yield smaller


def _simpler(p: Parameter) -> Iterator[Parameter]:
    plain = Parameter(p.name, p.shape, p.kind, p.layer)
    for name in ("tied", "group", "transposed", "tp", "fsdp_dim", "listed", "layer"):
        if getattr(p, name) != getattr(plain, name) or (name == "layer" and p.layer):
            changed: dict[str, Any] = {name: 0 if name == "layer" else getattr(plain, name)}
            yield replace(p, **changed)
    if p.heads is not None or p.sizes is not None:
        yield replace(p, heads=None, sizes=None)
    if len(p.shape) == 3 and p.tp in (None, 1, 2):
        yield replace(p, shape=p.shape[1:], tp=None if p.tp is None else p.tp - 1, listed=False)
