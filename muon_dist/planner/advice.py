"""Which settings would be better, found by planning with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from muon_dist.errors import ConfigError
from muon_dist.planner.devices import GIB, Device
from muon_dist.planner.model import PlannedParameter, Settings, Workload
from muon_dist.planner.placement import LAYOUTS
from muon_dist.planner.plan import Plan, cost_model, iteration_dtype, make_plan

_WORTH = 0.05  # of the step: less is not worth a change of settings
_FULL = 0.9  # of the device's memory: fragmentation and the framework need the rest
_SMALL = 4_000_000  # matrices times ranks up to which other settings are planned as well


def step_seconds(plan: Plan) -> float:
    """Predicted seconds of a whole step."""
    adamw = max(plan.seconds["forward and backward"], plan.seconds["AdamW's communication"])
    return (adamw + plan.seconds["AdamW's update"]) * (1 + plan.overhead)


def advise(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Plan:
    """`plan` with advice, each line with what it would change."""
    lines = [*_memory(plan, device), *_unsplit(plan, workload, settings, device)]
    if plan.matrices * plan.ranks <= _SMALL:
        lines += [*_buckets(plan, workload, settings, device), *_wire(plan, workload, settings, device)]
        lines += _layouts(plan, workload, settings, device)
    return replace(plan, advice=tuple(lines))


def _again(plan: Plan, workload: Workload, settings: Settings, device: Device, layout: str | None = None) -> Plan:
    nodes = plan.ranks // plan.per_node
    return make_plan(workload, settings, device, layout=layout or plan.layout, nodes=nodes, per_node=plan.per_node)


def _memory(plan: Plan, device: Device) -> Iterator[str]:
    total = sum(plan.memory.values())
    if total > _FULL * device.memory:
        part = max(plan.memory, key=lambda name: plan.memory[name])
        yield (
            f"does not fit: {total / GIB:.1f} GiB on a device of {device.memory / GIB:.0f} GiB; most of it is {part} "
            f"({plan.memory[part] / GIB:.1f} GiB)"
        )


def _unsplit(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    """Matrices that take longer than a rank's even share: more ranks do not help them."""
    mean = plan.newton_schulz["mean"]
    if plan.newton_schulz["max"] < 1.1 * mean:
        return
    dtype = iteration_dtype(settings, device)
    model = cost_model(workload, settings, device, plan.ranks, dtype)
    found: Counter[tuple[int, int]] = Counter()
    examples: dict[tuple[int, int], PlannedParameter] = {}
    for p in workload.muon:
        for m in p.matrices:
            found[m.rows, m.cols] += 1
            examples.setdefault((m.rows, m.cols), p)
    for shape in sorted(found, key=lambda s: (-s[0] * s[1], s)):
        seconds = model.orthogonalize(shape[0], shape[1], settings.iterations, dtype)
        if seconds <= mean:
            continue
        name = examples[shape].name
        word = "split by heads (optimizer.routing.split, heads: ...) if per-head updates are wanted"
        if not any(part in name for part in ("attn", "attention")):
            word = "nothing splits it without another update: it stays whole, and sets the least time"
        yield (
            f"{found[shape]} matrices of {shape[0]} x {shape[1]} (such as {name}) take {seconds / mean:.1f} times a "
            f"rank's even share of Newton-Schulz: {word}"
        )


def _buckets(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    lost = plan.newton_schulz["in buckets"] - plan.newton_schulz["max"]
    if lost < _WORTH * step_seconds(plan):
        return
    best = settings.bucket_mb, plan
    for factor in (4, 16, 64):
        other = _again(plan, workload, replace(settings, bucket_mb=settings.bucket_mb * factor), device)
        fits = sum(other.memory.values()) <= _FULL * device.memory
        if fits and step_seconds(other) < step_seconds(best[1]) * (1 - _WORTH / 2):
            best = settings.bucket_mb * factor, other
    if best[1] is not plan:
        yield (
            f"optimizer.muon.bucket_mb={best[0]:g}: owners wait for each other less, overhead over AdamW "
            f"{best[1].overhead:.1%} in place of {plan.overhead:.1%}, for "
            f"{(sum(best[1].memory.values()) - sum(plan.memory.values())) / GIB:.1f} GiB more"
        )


def _wire(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    if settings.wire_dtype is not None or plan.seconds["exchange"] <= plan.seconds["Newton-Schulz"]:
        return
    other = _again(plan, workload, replace(settings, wire_dtype=torch.bfloat16), device)
    if step_seconds(other) < step_seconds(plan) * (1 - _WORTH / 2):
        yield (
            f"optimizer.muon.wire_dtype=bfloat16: the exchange is longer than the arithmetic; overhead over AdamW "
            f"{other.overhead:.1%} in place of {plan.overhead:.1%} (the momentum is rounded before it is used)"
        )


def _layouts(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    others = []
    for layout in LAYOUTS:
        if layout == plan.layout or (layout == "hsdp" and plan.ranks == plan.per_node):
            continue
        try:
            others.append(_again(plan, workload, settings, device, layout))
        except ConfigError:
            continue
    fitting = [o for o in others if sum(o.memory.values()) <= _FULL * device.memory]
    if not fitting:
        return
    best = min(fitting, key=step_seconds)
    fits = sum(plan.memory.values()) <= _FULL * device.memory
    if not fits or step_seconds(best) < step_seconds(plan) * (1 - _WORTH):
        yield (
            f"--layout {best.layout}: {sum(best.memory.values()) / GIB:.1f} GiB a rank, a step of "
            f"{step_seconds(best):.2f} s in place of {step_seconds(plan):.2f} s"
        )
