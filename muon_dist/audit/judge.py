"""Compares one step of an optimizer with the plain step, stage by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from muon_dist.audit.alarm import Alarm, Circumstances, Observed
from muon_dist.audit.cause import Difference
from muon_dist.audit.recompute import BASES, Before, Hyperparameters, Step, plain_step
from muon_dist.audit.spread import spread_of
from muon_dist.audit.stages import added, update_alarm
from muon_dist.audit.tolerance import Precision, Tolerance, tolerance_of
from muon_dist.audit.written import Written


@dataclass(frozen=True)
class Finding:
    """The result of one audited matrix.

    Attributes:
        errors: relative errors of "momentum", "direction" (and length) of the update, and "weight".
        tolerance: tolerances of "momentum" and "direction" for this matrix.
        alarms: alarms, earliest stage first.
        wanted: the plain step, with the observed momentum; None for a rule without a plain form.
        limit: tolerance of the update, including the rounding of the weight.
        only: text about the compared tensors, if not all were compared.
    """

    errors: dict[str, float]
    tolerance: dict[str, float]
    alarms: tuple[Alarm, ...]
    wanted: Step | None
    limit: Tolerance
    only: str = ""


def judge(seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances) -> Finding:
    """The result of comparing a step with the plain step, computed in the dtype of `seen` or in fp64."""
    if not asked.known:
        return _of_unknown(seen, asked, precision, around)
    step, limit = _reference(seen, asked, precision, around)
    beta = asked.betas[0] if asked.rule == "adamw" else asked.momentum
    gradient = seen.before.gradient * asked.gradient_factor
    before = seen.before.momentum
    error, momentum = added(
        seen.momentum, before, gradient, beta, limit.momentum, asked, around, weight=seen.before.weight
    )
    errors = {"momentum": error}
    alarms = [momentum] if momentum is not None else []
    memory = _memory(seen, step, asked, limit, around)
    alarms += [memory] if memory is not None else []
    written = Written.of(seen.before.weight, seen.weight, step, asked, precision, limit)
    errors["direction"] = written.error
    errors["weight"] = Difference.between(seen.weight, written.want).error
    update = update_alarm(written, seen, asked, precision, limit, around)
    alarms += [update] if update is not None else []
    bounds = {"momentum": limit.momentum, "direction": written.bound}
    return Finding(errors, bounds, tuple(alarms), step, limit)


def _of_unknown(seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances) -> Finding:
    """The result for a user-defined rule: compares its momentum if it is Muon's. Copies are compared elsewhere."""
    limit = tolerance_of(precision, wanted=around.wanted)
    only = f"rule '{asked.rule}' has no plain form: "
    if not asked.plain_momentum:
        return Finding({}, {}, (), None, limit, f"{only}only copies are compared")
    gradient = seen.before.gradient * asked.gradient_factor
    args = (seen.momentum, seen.before.momentum, gradient, asked.momentum, limit.momentum, asked, around)
    error, alarm = added(*args)
    alarms = () if alarm is None else (alarm,)
    only += "only momentum and copies are compared"
    return Finding({"momentum": error}, {"momentum": limit.momentum}, alarms, None, limit, only)


def _reference(
    seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances
) -> tuple[Step, Tolerance]:
    """The plain step and the tolerance. If fp32 leaves a doubt: in fp64, with the measured spread of the dtype."""
    step = plain_step(seen.before, asked, momentum=seen.momentum, memory=seen.memory)
    limit = tolerance_of(precision, wanted=around.wanted)
    if asked.rule == "adamw":
        return step, limit
    written = Written.of(seen.before.weight, seen.weight, step, asked, precision, limit)
    doubt = written.wrong or bool(_off(seen, step, limit))
    if not doubt or not math.isfinite(written.error):
        return step, limit
    memory = {name: value.double() for name, value in seen.before.memory.items()}
    b, momentum = seen.before, seen.momentum.double()
    wide = Before(b.weight.double(), b.gradient.double(), b.momentum.double(), memory)
    step = plain_step(wide, asked, momentum=momentum)
    return step, tolerance_of(precision, spread_of(wide, asked, momentum, precision, step), around.wanted)


def _memory(
    seen: Observed, step: Step, asked: Hyperparameters, limit: Tolerance, around: Circumstances
) -> Alarm | None:
    """Compare the state of a rule besides momentum."""
    if asked.rule == "adamw":
        square = (seen.before.gradient * asked.gradient_factor).square()
        args = (seen.memory["exp_avg_sq"], seen.before.memory["exp_avg_sq"], square, asked.betas[1])
        return added(*args, limit.momentum, asked, around, "the second moment")[1]
    for name in BASES:
        if (error := _basis_error(name, seen)) > 1e-3:
            return Alarm("momentum", f"{name} is not orthonormal: {error:.2g} off", ("stale_memory",))
    for name, difference in _off(seen, step, limit).items():
        said = f"{name} is {100 * difference.error:.2g}% off"
        return Alarm("momentum", said, ("stale_memory",), difference.factor, difference.angle)
    return None


def _off(seen: Observed, step: Step, limit: Tolerance) -> dict[str, Difference]:
    """The wrong tensors of a rule's memory. They hold squares of directions: more than twice the error is allowed."""
    found = {
        name: Difference.between(value, step.memory[name]) for name, value in seen.memory.items() if name not in BASES
    }
    return {name: difference for name, difference in found.items() if difference.error > 4 * limit.direction}


def _basis_error(name: str, seen: Observed) -> float:
    """The error of a basis's columns from being orthonormal; 0 if there is no basis yet."""
    if name not in seen.memory or not bool(seen.memory[name].any()):
        return 0.0
    side = math.isqrt(seen.memory[name].numel())
    q = seen.memory[name].view(side, side).double()
    return float((q.mT @ q - torch.eye(side, dtype=q.dtype, device=q.device)).norm())
