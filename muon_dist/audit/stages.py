"""Checks of single stages of a step; if a stage is wrong, they find the cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from muon_dist.audit.alarm import Alarm, Circumstances, Cut, Observed
from muon_dist.audit.cause import Difference, Factor, Verdict, explain, match_factor
from muon_dist.audit.deviations import (
    BIAS,
    FLIPPED,
    RATES,
    SWAPPED,
    directions,
    factors,
    flipped,
    gradient_factors,
    halves,
    rates,
    swapped,
    trait,
)
from muon_dist.audit.recompute import Hyperparameters
from muon_dist.audit.tolerance import Precision, Tolerance
from muon_dist.audit.written import Written, fit, rounded_to

_STAGES = {BIAS: "direction", "wrong_sign": "direction", "decay_order": "decay"}
"""Causes that look like a factor, but are not a factor."""
FEW = 2
"""Up to this many wrong elements count as flipped bits."""


def localized(alarms: Mapping[str, tuple[Alarm | None, tuple[int, ...]]]) -> Alarm | None:
    """The alarm of the wrong parts, if other parts are right. alarms: (alarm, ranks) by name of the part."""
    wrong = {name: (alarm, ranks) for name, (alarm, ranks) in alarms.items() if alarm is not None}
    if not wrong or len(wrong) == len(alarms):
        return None
    first = next(alarm for alarm, _ in wrong.values() if alarm is not None)
    ranks = tuple(rank for _, of_part in wrong.values() for rank in of_part)
    names = f"on rank {', '.join(map(str, ranks))}" if ranks else ", ".join(wrong)
    return replace(first, sentence=f"only {names}: {first.sentence}", ranks=ranks)


def bands(wrong: Tensor) -> dict[str, Cut]:
    """The band of rows, or columns, with errors, and the rest; empty if errors are everywhere or scattered.

    wrong: sizes of errors, (rows, cols); zero without an error.
    """
    if wrong.ndim != 2:
        return {}
    for dim, word in ((0, "rows"), (1, "columns")):
        inside = (wrong > 0).any(dim=1 - dim)
        places = inside.nonzero().flatten().tolist()
        if places and len(places) < len(inside) and places[-1] - places[0] + 1 == len(places):
            name = f"{word} {places[0]} to {places[-1]}" if len(places) > 1 else f"{word[:-1]} {places[0]}"
            return {name: partial(_where, dim, inside), "the others": partial(_where, dim, ~inside)}
    return {}


def _where(dim: int, chosen: Tensor, matrix: Tensor) -> Tensor:
    return matrix.index_select(dim, chosen.nonzero().flatten())


def _parts(held: Mapping[int, Cut], wrong: Tensor) -> dict[str, tuple[Cut, tuple[int, ...]]]:
    """Parts of a matrix that may be wrong while others are right: each rank's part, or a band of rows or columns."""
    if len(held) > 1:
        return {f"rank {rank}": (cut, (rank,)) for rank, cut in held.items()}
    return {name: (cut, ()) for name, cut in bands(wrong).items()}


def added(
    got: Tensor, old: Tensor, new: Tensor, beta: float, limit: float, asked: Hyperparameters, around: Circumstances,
    what: str = "momentum", weight: Tensor | None = None,
) -> tuple[float, Alarm | None]:  # fmt: skip
    """Error and alarm of a moving average, got = beta old + (1 - beta) new. weight: the weight before the step."""
    want = beta * old + (1 - beta) * new
    size = beta * float(old.norm()) + (1 - beta) * float(new.norm())
    difference = Difference.between(got, want)
    error = float((got - want).norm()) / size if size > 0 else difference.error
    if error <= limit:
        return error, None
    turn = difference.factor, difference.angle
    if not math.isfinite(error):
        return error, Alarm("momentum", f"{what} is not finite", ("not_finite",), *turn)
    wrong = (got - want).abs()
    if (few := int((wrong > 0.01 * wrong.max()).sum())) <= FEW < got.numel():
        return error, Alarm("momentum", f"{few} elements of {what} are wrong", ("bit_flipped",), *turn)
    parts = _parts(around.momentum, wrong * (wrong > limit * want.abs().max()))
    inner = replace(around, momentum={})
    found = {
        name: (added(cut(got), cut(old), cut(new), beta, limit, asked, inner, what)[1], ranks)
        for name, (cut, ranks) in parts.items()
    }
    if (alarm := localized(found)) is not None:
        return error, alarm
    return error, replace(_sum(got, old, new, beta, limit, asked, around, what, weight), factor=turn[0], angle=turn[1])


def _sum(
    got: Tensor, old: Tensor, new: Tensor, beta: float, limit: float, asked: Hyperparameters, around: Circumstances,
    what: str, weight: Tensor | None,
) -> Alarm:  # fmt: skip
    """The alarm of a wrong moving average; its sentence names the wrong terms."""
    p, q, left, _ = fit(got, old, new)
    size = beta * float(old.norm()) + (1 - beta) * float(new.norm())
    want = beta * old + (1 - beta) * new
    error, close = float((got - want).norm()) / size, 20 * limit + 1e-4
    if left / size > max(limit, 0.02 * error):
        if narrow := rounded_to(got):
            return Alarm("momentum", f"{what} is rounded to {narrow}", ("rounded",))
        if weight is not None and bool(weight.any()):
            rest = (got - want).double()
            c = float((rest * weight).sum() / weight.double().square().sum())
            if float((rest - c * weight).norm()) < 0.02 * float(rest.norm()):
                said = f"{c / (1 - beta):.3g} times the weight was added to the gradient: decay that is not decoupled"
                return Alarm("gradient", said, ("coupled_decay",))
        sentence = f"{what} is not {beta:g} of the old one and {1 - beta:g} of the gradient"
        return Alarm("momentum", sentence, ("other_gradient", "stale_momentum"))
    moving = bool(old.any())
    if moving and abs(p - 1) < close and abs(q) < close:
        return Alarm("momentum", f"{what} is what it was before the step", ("not_updated",))
    if moving and abs(p + q - 1) < close:
        return Alarm("momentum", f"decay {p:.4g} of {what}, asked {beta:g}", ("wrong_beta",))
    if abs(p - beta) < close or not moving:
        f = q / (1 - beta)
        cause = match_factor(f, gradient_factors(asked, beta, around.world_size), 0.01)
        names = (cause.name,) if cause else ("scaled_gradient",) + (() if moving else ("wrong_beta",))
        if abs(f + 1) < 0.01:
            names = ("wrong_sign",)
        said = f": {cause.sentence}" if cause else ""
        return Alarm("gradient", f"the gradient in {what} is {f:.4g} times the raw one{said}", names)
    sentence = f"{what} is {p:.4g} of the old one and {q:.4g} of the gradient, asked {beta:g} and {1 - beta:g}"
    return Alarm("momentum", sentence, ("lost_momentum" if p < beta else "wrong_beta",))


def update_alarm(
    w: Written, seen: Observed, asked: Hyperparameters, precision: Precision, limit: Tolerance, around: Circumstances
) -> Alarm | None:
    """The alarm of a wrong written weight; None if rounding explains the difference."""
    if not w.wrong:
        return None
    if not math.isfinite(w.error):
        return Alarm("direction", "the weight is not finite", ("not_finite",), math.nan, math.nan)
    others = rates(asked, around.earlier, around.others)
    lengths = [*others, *factors(asked, seen.before, around.world_size)]
    alarm = length_alarm(w, lengths)
    if alarm is None:
        alarm = _of_elements(w, asked, precision, limit, around, lengths)
    return alarm if alarm is not None else _of_direction(w, seen, asked, around, lengths)


def _of_elements(
    w: Written, asked: Hyperparameters, precision: Precision, limit: Tolerance, around: Circumstances,
    lengths: Sequence[Factor],
) -> Alarm | None:  # fmt: skip
    """The alarm for wrong single elements, a wrong band of rows, a wrong part of one rank, or wrong rounding."""
    wrong = (w.got - w.want).abs()
    turn = Difference.between(w.decay * w.old - w.got, w.update)
    numbers = turn.factor, turn.angle
    if int((wrong > 0.01 * wrong.max()).sum()) <= FEW < wrong.numel():
        return Alarm("weight", "single elements of the written weight are wrong", ("bit_flipped",), *numbers)
    parts = _parts(around.weights, wrong * (wrong > 0.02 * float(w.update.norm()) / math.sqrt(w.update.numel())))
    found: dict[str, tuple[Alarm | None, tuple[int, ...]]] = {}
    for name, (cut, ranks) in parts.items():
        decay = cut(w.decay) if isinstance(w.decay, Tensor) else w.decay
        part = Written.part(cut(w.old), cut(w.got), cut(w.update), decay, asked, precision, limit)
        one = Alarm("weight", "the update is another", ("wrong_part",), *numbers)
        found[name] = ((length_alarm(part, lengths) or one) if part.wrong else None), ranks
    if (alarm := localized(found)) is not None:
        return alarm
    if w.rounded:
        return Alarm("weight", f"the written weight is rounded to {w.rounded}", ("rounded",), *numbers)
    return None


def _of_direction(
    w: Written, seen: Observed, asked: Hyperparameters, around: Circumstances, lengths: Sequence[Factor]
) -> Alarm:
    """The alarm of an update with a wrong direction."""
    got, want, limit = (w.decay * w.old - w.got) / w.rate, w.update / w.rate, max(w.bound, 0.01)
    ways = directions(seen.before, asked, seen.momentum, dict(seen.memory), got, around.world_size)
    verdict = explain(got, want, directions=ways, factors=lengths, tolerance=limit)
    if verdict.causes or asked.rule == "adamw":
        names = tuple(c.name for c in verdict.causes) or ("unknown",)
        return _said(verdict, verdict.sentence, names)
    size = verdict.sentence.partition(":")[0]
    if flip := flipped(seen.before, asked, seen.momentum, got, want, limit):
        return _said(verdict, f"{size}: {flip}", (FLIPPED.name,))
    narrow = explain(got, want, directions=halves(seen.before, asked, seen.momentum), tolerance=limit)
    cause = next(iter(narrow.causes), None)
    if cause is None:
        cause = SWAPPED if swapped(verdict.difference) else trait(got, want) if asked.rule == "muon" else None
    if cause is None:
        return _said(verdict, verdict.sentence, ("unknown",))
    return _said(verdict, f"{size}: {cause.sentence}", (cause.name,))


def _said(verdict: Verdict, sentence: str, names: tuple[str, ...]) -> Alarm:
    return Alarm("direction", sentence, names, verdict.difference.factor, verdict.difference.angle)


def length_alarm(w: Written, lengths: Sequence[Factor]) -> Alarm | None:
    """The alarm of a difference that factors on old weight and update explain; None if they do not explain it."""
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
        return replace(_decay(w, lengths), factor=numbers[0], angle=numbers[1])
    cause = match_factor(f, lengths, max(2 * w.bound_b, 2e-4))
    said = f"the update is {f:.4g} times what was asked" + (f": {cause.sentence}" if cause else "")
    names = (cause.name,) if cause else ("wrong_sign",) if f < 0 else ("wrong_factor",)
    if names[0] in _STAGES:
        return Alarm(_STAGES[names[0]], said, names, *numbers)
    with_decay = abs(w.a + w.b * lost) <= max(w.bound_a, 0.2 * abs(w.b) * lost)
    if lost * abs(w.b) > 2 * w.bound_a:  # a wrong rate would show in the decay too
        if with_decay:
            return Alarm("rate", said, names if names[0] in RATES else ("wrong_rate",), *numbers)
        stage = "scale" if not w.off_a else "weight"
        return Alarm(stage, said, names if names[0] not in RATES else ("wrong_factor",), *numbers)
    stage = "scale" if cause and cause.name == "wrong_scale" else "rate"
    return Alarm(stage, said, names, *numbers)


def _decay(w: Written, lengths: Sequence[Factor]) -> Alarm:
    """The alarm of a wrong factor on the old weight."""
    if w.lost > 0 and abs(w.a - w.lost) < 0.2 * w.lost:
        return Alarm("decay", "weight decay was not applied", ("skipped_decay",))
    said = f"the old weight was multiplied by {1 - w.lost + w.a:.8g}, asked {1 - w.lost:.8g}"
    others = [f for f in lengths if f.cause.name in RATES]
    cause = match_factor(1 - w.a / w.lost, others, 0.01) if w.lost > 0 else None
    names = ("wrong_decay", cause.name) if cause else ("wrong_decay",)
    return Alarm("decay", f"{said}: {cause.sentence}" if cause else said, names)
