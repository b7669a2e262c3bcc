"""Finds better settings by planning with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from muon_dist.planner.devices import GIB, Device
from muon_dist.planner.mesh import notes, own_loop
from muon_dist.planner.model import PlannedParameter, Settings, Workload
from muon_dist.planner.plan import Plan, cost_model, iteration_dtype, plan_on, step_seconds
from muon_dist.planner.search import Outline, outlines, ranked

_WORTH = 0.05  # share of the step: a smaller gain is not worth a change of settings
_FIRST = 3  # number of meshes of the search that are planned with real owners
_SMALL = 4_000_000  # largest matrices x ranks for which other settings are planned too


def advise(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Plan:
    """`plan` with advice: one line per change with its effect; the last lines compare all meshes of this number of
    ranks."""
    lines = [*_memory(plan, device), *_unsplit(plan, workload, settings, device)]
    if plan.matrices * plan.ranks <= _SMALL:
        lines += [*_buckets(plan, workload, settings, device), *_wire(plan, workload, settings, device)]
        lines += _policy(plan, workload, settings, device)
    else:
        lines.append(
            f"bucket_mb, wire_dtype and owner_policy were not tried: {plan.matrices:,} matrices on {plan.ranks:,} "
            "ranks take too long"
        )
    lines += _meshes(plan, workload, settings, device)
    return replace(plan, advice=tuple(lines))


def _again(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Plan:
    return plan_on(plan.mesh, workload, settings, device)


def _memory(plan: Plan, device: Device) -> Iterator[str]:
    if not plan.fits:
        part = max(plan.memory, key=lambda name: plan.memory[name])
        yield (
            f"does not fit: {plan.memory_total / GIB:.1f} GiB, and of the {device.memory / GIB:.1f} GiB of the device "
            f"{plan.usable / GIB:.1f} are usable (10% are kept in reserve); most of it is {part} "
            f"({plan.memory[part] / GIB:.1f} GiB)"
        )


def _unsplit(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    """Matrices that take longer than a rank's even share, so that more ranks do not help."""
    mean = plan.newton_schulz["mean"]
    if plan.newton_schulz["max"] < 1.1 * mean:
        return
    dtype = iteration_dtype(settings, device)
    stage = workload.largest_stage(plan.mesh.pp)
    model = cost_model(stage, settings, device, plan.mesh.stage_ranks, dtype)
    found: Counter[tuple[int, int]] = Counter()
    examples: dict[tuple[int, int], PlannedParameter] = {}
    for p in stage.muon:
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
            word = "every split would change the update, so it stays whole and sets the shortest possible time"
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
        if other.fits and step_seconds(other) < step_seconds(best[1]) * (1 - _WORTH / 2):
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


def _policy(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    """Advice on round-robin owners if they are balanced better: the effect on the whole step."""
    ns = plan.newton_schulz
    if settings.owner_policy == "round_robin" or ns["round robin"] >= ns["max"] * (1 - _WORTH / 5):
        return
    other = _again(plan, workload, replace(settings, owner_policy="round_robin"), device)
    moved = sum(other.moved["Muon"]) / 1e9, sum(plan.moved["Muon"]) / 1e9
    word = "slower" if step_seconds(other) > step_seconds(plan) else "faster"
    yield (
        f"optimizer.muon.owner_policy=round_robin: more even, for {moved[0]:.2f} GB that a rank receives in place of "
        f"{moved[1]:.2f} GB; the step is {word}: {step_seconds(other):.4g} s in place of {step_seconds(plan):.4g} s"
    )


def _meshes(plan: Plan, workload: Workload, settings: Settings, device: Device) -> Iterator[str]:
    """The best mesh of this number of ranks with the same tokens per step, the reason, and the next best."""
    found = outlines(workload, settings, device, plan.ranks, plan.per_node, plan.tokens)
    own = Outline.of_plan(plan, settings)
    rivals = [o for o in ranked(found) if o.mesh != plan.mesh]
    if plan.matrices * plan.ranks <= _SMALL:  # the first meshes, now with real owners
        planned = (Outline.of_plan(plan_on(o.mesh, workload, o.settings, device), o.settings) for o in rivals[:_FIRST])
        rivals = [*ranked(list(planned)), *rivals[_FIRST:]]
    if not rivals and not own.fits:
        least = min([own, *found], key=lambda o: o.total)
        yield (
            f"no mesh of {plan.ranks:,} ranks with {plan.tokens:,} tokens per step fits; the smallest is "
            f"{least.mesh.options()} with {least.total / GIB:.1f} GiB per rank: use more ranks, recomputation "
            "(trainer.gradient_checkpointing) or a smaller micro-batch"
        )
    elif not rivals:
        yield f"no other mesh of {plan.ranks:,} ranks with {plan.tokens:,} tokens per step fits"
    elif not own.fits or rivals[0].step < own.step * (1 - _WORTH):
        best = rivals[0]
        after = f"; next: {_figures(rivals[1], own)}" if len(rivals) > 1 else "; no other fits"
        yield f"{_figures(best, own)} in place of {_time(own.step)}; {_reason(best, own)}{after}"
        yield from (f"that mesh: {note}" for note in notes(best.mesh))
        stock = next((o for o in rivals[1:] if not own_loop(o.mesh)), None)
        if own_loop(best.mesh) and stock is not None:
            yield f"the best that needs no training loop of your own: {_figures(stock, own)}"
    else:
        yield (
            f"of {len(found):,} meshes of {plan.ranks:,} ranks none is more than {_WORTH:.0%} faster than this one: "
            f"{_figures(own, own)}; next: {_figures(rivals[0], own)} ({_reason(own, rivals[0])})"
        )


def _time(seconds: float) -> str:
    return f"{seconds:.4g} s"


def _figures(o: Outline, own: Outline) -> str:
    """One mesh as command-line options, with its memory and step time."""
    changed = ""
    if o.settings.accumulation != own.settings.accumulation:
        changed = f" trainer.gradient_accumulation_steps={o.settings.accumulation}"
    return f"{o.mesh.options()}{changed}: {o.total / GIB:.1f} GiB per rank, a step of {_time(o.step)}"


def _reason(best: Outline, other: Outline) -> str:
    """The largest gain of `best` over `other`: memory if that one does not fit, else a part of the step."""
    if not other.fits:
        part = max(other.memory, key=lambda name: other.memory[name] - best.memory[name])
        return f"it fits: {part} {best.memory[part] / GIB:.1f} GiB in place of {other.memory[part] / GIB:.1f} GiB"
    names = {**other.seconds, **best.seconds}
    gain = {name: other.seconds.get(name, 0.0) - best.seconds.get(name, 0.0) for name in names}
    part = max(gain, key=lambda name: gain[name])
    if best.step >= other.step or gain[part] <= 0:
        return "about as fast"
    return f"{part} {_time(best.seconds.get(part, 0.0))} in place of {_time(other.seconds.get(part, 0.0))}"
