"""Compares one step that an optimizer has made with the plain one, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muon_dist.audit.cause import Difference, explain, match_factor
from muon_dist.audit.deviations import BIAS, FLIPPED, SWAPPED, directions, factors, flipped, gradient_factors, swapped
from muon_dist.audit.recompute import BASES, Before, Hyperparameters, Step, plain_step
from muon_dist.audit.spread import spread_of
from muon_dist.audit.tolerance import Precision, Tolerance, tolerance_of

STAGES = ("gradient", "momentum", "direction", "scale", "decay", "rate", "weight", "copy")
"""Of a step, in which an alarm may be. "weight": the written weight; "copy": what other ranks hold of it."""


@dataclass(frozen=True)
class Observed:
    """A matrix before and after one step of an optimizer: whole tensors in fp32 or fp64.

    Attributes:
        before: the inputs.
        momentum, weight, memory: after the step.
    """

    before: Before
    momentum: Tensor
    weight: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Alarm:
    """A stage of the step that is wrong.

    Attributes:
        stage: one of `STAGES`.
        sentence: for people: what is wrong.
        causes: names of likely causes.
        factor, angle: of what was found to what was wanted, see `Difference`; angle in radians.
        ranks: whose copy is wrong, if not all are.
    """

    stage: str
    sentence: str
    causes: tuple[str, ...] = ()
    factor: float = 1.0
    angle: float = 0.0
    ranks: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        numbers = {"factor": self.factor, "angle": self.angle}
        return {
            "stage": self.stage,
            "sentence": self.sentence,
            "causes": list(self.causes),
            "ranks": list(self.ranks),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }


@dataclass(frozen=True)
class Finding:
    """The result of one audited matrix.

    Attributes:
        errors: relative errors of "momentum", "direction" (and length) of the update, and "weight".
        tolerance: of "momentum" and "direction", as they held for this matrix.
        alarms: the earliest stage first.
        wanted: the plain step, of the momentum that was observed; None for a rule that has no plain form.
        limit: tolerance of the update, with the rounding of the weight.
        only: what was compared, if not all was.
    """

    errors: dict[str, float]
    tolerance: dict[str, float]
    alarms: tuple[Alarm, ...]
    wanted: Step | None
    limit: Tolerance
    only: str = ""


@dataclass(frozen=True)
class Circumstances:
    """Other facts that may explain a difference.

    Attributes:
        earlier: learning rates of the steps before.
        world_size: ranks that share the work.
        wanted: the user's tolerance, if there is one.
    """

    earlier: Sequence[float] = ()
    world_size: int = 1
    wanted: float | None = None


def judge(seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances) -> Finding:
    """Compare a step with the plain one. All arithmetic is in the dtype of the tensors of `seen`, or in fp64."""
    if not asked.known:
        return _of_unknown(seen, asked, precision, around)
    step, limit = _reference(seen, asked, precision, around)
    beta = asked.betas[0] if asked.rule == "adamw" else asked.momentum
    gradient = seen.before.gradient * asked.gradient_factor
    before = seen.before.momentum
    error, momentum = _added(seen.momentum, before, gradient, beta, limit.momentum, asked, around)
    errors = {"momentum": error}
    alarms = [momentum] if momentum is not None else []
    memory = _memory(seen, step, asked, limit, around)
    alarms += [memory] if memory is not None else []
    written = Written.of(seen.before.weight, seen.weight, step, asked, precision, limit)
    errors["direction"] = written.error
    errors["weight"] = Difference.between(seen.weight, written.want).error
    update = _update(written, seen, asked, around)
    alarms += [update] if update is not None else []
    bounds = {"momentum": limit.momentum, "direction": written.bound}
    return Finding(errors, bounds, tuple(alarms), step, limit)


def _of_unknown(seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances) -> Finding:
    """Compare the momentum of a registered rule, if it is Muon's. Copies are compared for every rule."""
    limit = tolerance_of(precision, wanted=around.wanted)
    only = f"rule '{asked.rule}' has no plain form: "
    if not asked.plain_momentum:
        return Finding({}, {}, (), None, limit, f"{only}only copies are compared")
    gradient = seen.before.gradient * asked.gradient_factor
    args = (seen.momentum, seen.before.momentum, gradient, asked.momentum, limit.momentum, asked, around)
    error, alarm = _added(*args)
    alarms = () if alarm is None else (alarm,)
    only += "only momentum and copies are compared"
    return Finding({"momentum": error}, {"momentum": limit.momentum}, alarms, None, limit, only)


def _reference(
    seen: Observed, asked: Hyperparameters, precision: Precision, around: Circumstances
) -> tuple[Step, Tolerance]:
    """The plain step and the tolerance. In fp64, with the spread of the dtype measured, where fp32 leaves a doubt."""
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


def fit(rest: Tensor, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """(a, b, norm of what is left, condition) of the least squares rest = a x + b y, in fp64.

    The number for a vector that is zero is 0. Errors of `a` and `b` are `condition` times as large as they would be if
    x and y were at right angles.
    """
    rest, x, y = (t.detach().double().flatten() for t in (rest, x, y))
    xx, yy, xy, xr, yr = (float(p @ q) for p, q in ((x, x), (y, y), (x, y), (x, rest), (y, rest)))
    determinant = xx * yy - xy * xy
    condition = 1.0
    if determinant > 1e-6 * xx * yy:
        a, b = (yy * xr - xy * yr) / determinant, (xx * yr - xy * xr) / determinant
        condition = math.sqrt(xx * yy / determinant)
    else:  # one of them is zero, or they are parallel
        a, b = (0.0, yr / yy) if yy > 0 else (xr / xx if xx > 0 else 0.0, 0.0)
    return a, b, float((rest - a * x - b * y).norm()), condition


def _added(
    got: Tensor, old: Tensor, new: Tensor, beta: float, limit: float, asked: Hyperparameters, around: Circumstances,
    what: str = "momentum",
) -> tuple[float, Alarm | None]:  # fmt: skip
    """Error and alarm of a moving average: got = beta old + (1 - beta) new."""
    want = beta * old + (1 - beta) * new
    size = beta * float(old.norm()) + (1 - beta) * float(new.norm())
    difference = Difference.between(got, want)
    error = float((got - want).norm()) / size if size > 0 else difference.error
    if error <= limit:
        return error, None
    turn = difference.factor, difference.angle
    if not math.isfinite(error):
        return error, Alarm("momentum", f"{what} is not finite", ("not_finite",), *turn)
    p, q, left, _ = fit(got, old, new)
    close = 20 * limit + 1e-4
    if left / size > max(limit, 0.02 * error):
        wrong = (got - want).abs()
        few = int((wrong > 0.01 * wrong.max()).sum())
        if few <= 2:
            return error, Alarm("momentum", f"{few} elements of {what} are wrong", ("bit_flipped",), *turn)
        sentence = f"{what} is not {beta:g} of the old one and {1 - beta:g} of the gradient"
        return error, Alarm("momentum", sentence, ("other_gradient", "stale_momentum"), *turn)
    if bool(old.any()) and abs(p + q - 1) < close:
        return error, Alarm("momentum", f"decay {p:.4g} of {what}, asked {beta:g}", ("wrong_beta",), *turn)
    if abs(p - beta) < close or not bool(old.any()):
        f = q / (1 - beta)
        cause = match_factor(f, gradient_factors(asked, around.world_size), 0.01)
        names = (cause.name,) if cause else ("scaled_gradient",) + (() if bool(old.any()) else ("wrong_beta",))
        said = f": {cause.sentence}" if cause else ""
        return error, Alarm("gradient", f"the gradient in {what} is {f:.4g} times the raw one{said}", names, *turn)
    sentence = f"{what} is {p:.4g} of the old one and {q:.4g} of the gradient, asked {beta:g} and {1 - beta:g}"
    return error, Alarm("momentum", sentence, ("lost_momentum" if p < beta else "wrong_beta",), *turn)


def _memory(
    seen: Observed, step: Step, asked: Hyperparameters, limit: Tolerance, around: Circumstances
) -> Alarm | None:
    """Compare the state of a rule besides momentum."""
    if asked.rule == "adamw":
        square = (seen.before.gradient * asked.gradient_factor).square()
        args = (seen.memory["exp_avg_sq"], seen.before.memory["exp_avg_sq"], square, asked.betas[1])
        return _added(*args, limit.momentum, asked, around, "the second moment")[1]
    for name in BASES:
        if (error := _basis_error(name, seen)) > 1e-3:
            return Alarm("momentum", f"{name} is not orthonormal: {error:.2g} off", ("stale_memory",))
    for name, difference in _off(seen, step, limit).items():
        said = f"{name} is {100 * difference.error:.2g}% off"
        return Alarm("momentum", said, ("stale_memory",), difference.factor, difference.angle)
    return None


def _off(seen: Observed, step: Step, limit: Tolerance) -> dict[str, Difference]:
    """What of a rule's memory is wrong. It holds squares of directions, with twice their error and some rows more."""
    found = {
        name: Difference.between(value, step.memory[name]) for name, value in seen.memory.items() if name not in BASES
    }
    return {name: difference for name, difference in found.items() if difference.error > 4 * limit.direction}


def _basis_error(name: str, seen: Observed) -> float:
    """The distance of a basis's columns from orthonormal; 0 if there is no basis yet."""
    if name not in seen.memory or not bool(seen.memory[name].any()):
        return 0.0
    side = math.isqrt(seen.memory[name].numel())
    q = seen.memory[name].view(side, side).double()
    return float((q.mT @ q - torch.eye(side, dtype=q.dtype, device=q.device)).norm())


@dataclass(frozen=True)
class Written:
    """A weight that was written, or a part of it, against the one that was wanted.

    Attributes:
        old, got, want: the weight before the step, after it, and as it should be.
        update: what should have been subtracted.
        decay: factor on the old weight, a number or of its shape.
        lost: share of a decayed element that is taken away.
        a, b: got - want is `a` times the old weight (of cautious decay: its decayed elements), minus `b` times the
            update, and what is `left`; as norms of the update. So the update was 1 + b times what it should be.
        error: norm of got - want in norms of the update.
        bound: of `error`.
        bound_a, bound_b: of `a` and `b`: rounding errors of many elements nearly cancel there.
    """

    old: Tensor
    got: Tensor
    want: Tensor
    update: Tensor
    decay: Tensor | float
    lost: float
    a: float
    b: float
    left: float
    error: float
    bound: float
    bound_a: float
    bound_b: float

    @classmethod
    def of(
        cls, old: Tensor, got: Tensor, step: Step, asked: Hyperparameters, precision: Precision, limit: Tolerance
    ) -> Written:
        """The fit for a whole matrix."""
        return cls.part(old, got, step.rate * step.direction, step.decay, asked, precision, limit)

    @classmethod
    def part(
        cls, old: Tensor, got: Tensor, update: Tensor, decay: Tensor | float, asked: Hyperparameters,
        precision: Precision, limit: Tolerance,
    ) -> Written:  # fmt: skip
        """The fit for any part of a matrix; all tensors have one shape."""
        old, got, update = old.double(), got.double(), update.double()
        decay, decayed = (decay.double() if isinstance(decay, Tensor) else decay), old
        if isinstance(decay, Tensor) and bool((decay < decay.max()).any()):
            decayed = torch.where(decay < decay.max(), old, 0.0)
        lost = 1 - float(decay.min() if isinstance(decay, Tensor) else decay)
        want = decay * old - update
        if precision.weight.itemsize < 4 and not precision.stochastic and not asked.rescales:
            # Decay is lost in the rounding of a 16-bit weight: that is what the dtype does, not a fault.
            want = ((decay * old).to(precision.weight).double() - update).to(precision.weight).double()
        rest = got - want
        size, weight, n = float(update.norm()), float(old.norm()), max(update.numel(), 1)
        a, b, left, condition = fit(rest, decayed, -update)
        noise = limit.written * weight
        root = math.sqrt(n)
        if size == 0.0:
            error = float(rest.norm()) / weight if weight > 0 else float(rest.norm())
            return cls(
                old, got, want, update, decay, lost, a, 0.0, left, error, limit.written, limit.written, math.inf
            )
        bound = limit.direction + noise / size
        bound_b = limit.direction + 6 * noise / (size * root)
        bound_a = math.inf
        if weight > 0:
            share, rounding = max(10 / root, 0.02), 6 / root
            if asked.rescales:  # its factor on the old weight follows from the weight that was written
                share = rounding = 1.0
            bound_a = rounding * limit.written + limit.direction * size / weight * share
        error = float(rest.norm()) / size
        bound_a, bound_b = condition * bound_a, condition * bound_b
        return cls(old, got, want, update, decay, lost, a, b, left / size, error, bound, bound_a, bound_b)

    @property
    def off_a(self) -> bool:
        """Whether the old weight was multiplied with another factor."""
        return abs(self.a) > max(self.bound_a, 0.2 * self.lost)

    @property
    def off_b(self) -> bool:
        """Whether the update was multiplied with another factor."""
        return abs(self.b) > self.bound_b

    @property
    def wrong(self) -> bool:
        """Whether rounding does not explain the difference."""
        return not math.isfinite(self.error) or self.error > self.bound or self.off_a or self.off_b


def _update(w: Written, seen: Observed, asked: Hyperparameters, around: Circumstances) -> Alarm | None:
    if not w.wrong:
        return None
    lengths = factors(asked, seen.before, around.earlier, around.world_size)
    if not math.isfinite(w.error):
        return Alarm("direction", "the weight is not finite", ("not_finite",), math.nan, math.nan)
    alarm = length_alarm(w, asked, lengths)
    if alarm is not None:
        return alarm
    rate = float(w.update.norm())
    got, want = (w.decay * w.old - w.got) / rate, w.update / rate
    ways = directions(seen.before, asked, seen.momentum, dict(seen.memory))
    verdict = explain(got, want, directions=ways, factors=lengths, tolerance=max(w.bound, 0.01))
    turn = verdict.difference.factor, verdict.difference.angle
    if verdict.causes:
        return Alarm("direction", verdict.sentence, tuple(c.name for c in verdict.causes), *turn)
    if asked.rule != "adamw":
        flip = flipped(seen.before, asked, seen.momentum, got, want, max(w.bound, 0.01))
        if flip:
            return Alarm("direction", f"{verdict.sentence.partition(':')[0]}: {flip}", (FLIPPED.name,), *turn)
    wrong = (got - want).abs()
    if int((wrong > 0.01 * wrong.max()).sum()) <= 2:
        return Alarm("weight", "single elements of the written weight are wrong", ("bit_flipped",), *turn)
    if swapped(verdict.difference):
        return Alarm("direction", f"{verdict.sentence.partition(':')[0]}: {SWAPPED.sentence}", (SWAPPED.name,), *turn)
    return Alarm("direction", verdict.sentence, ("unknown",), *turn)


def length_alarm(w: Written, asked: Hyperparameters, lengths: Sequence[Any]) -> Alarm | None:
    """The alarm of a difference that factors on old weight and update explain; None if they do not."""
    weight = float(w.old.norm()) / float(w.update.norm()) if bool(w.update.any()) else math.inf
    explained = max(abs(w.b), abs(w.a) * weight)
    if w.left > max(w.bound, 0.02 * explained):
        return None
    f, lost, turn = 1 + w.b, w.lost, Difference.between(w.decay * w.old - w.got, w.update)
    numbers = f, turn.angle
    if abs(f) < max(0.01, w.bound_b):
        decayed = "" if w.off_a or lost == 0 else ", though decay was"
        return Alarm("copy", f"the update was not applied{decayed}", ("dropped",), *numbers)
    if w.off_a and not w.off_b:
        if lost > 0 and abs(w.a - lost) < 0.2 * lost:
            return Alarm("decay", "weight decay was not applied", ("skipped_decay",), *numbers)
        said = f"the old weight was multiplied by {1 - lost + w.a:.8g}, asked {1 - lost:.8g}"
        return Alarm("decay", said, ("wrong_decay",), *numbers)
    cause = match_factor(f, lengths, max(2 * w.bound_b, 0.002))
    said = f"the update is {f:.4g} times what was asked" + (f": {cause.sentence}" if cause else "")
    names = (cause.name,) if cause else ("wrong_factor",)
    if names == (BIAS,):
        return Alarm("direction", said, names, *numbers)
    with_decay = abs(w.a + w.b * lost) <= max(w.bound_a, 0.2 * abs(w.b) * lost)
    if lost * abs(w.b) > 2 * w.bound_a:  # a wrong rate would show in the decay too
        if with_decay:
            return Alarm("rate", said, names if cause and cause.name == "old_rate" else ("wrong_rate",), *numbers)
        stage = "scale" if not w.off_a else "weight"
        return Alarm(stage, said, names if not cause or cause.name != "old_rate" else ("wrong_factor",), *numbers)
    stage = "scale" if cause and cause.name == "wrong_scale" else "rate"
    return Alarm(stage, said, names, *numbers)
