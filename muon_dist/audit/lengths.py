"""Judges the lengths of updates: the factor of the shape, the rate, the decay, and factors applied by mistake.

One matrix cannot show whether its factor or its rate differs; several shapes together can.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.audit.asked import Asked
from muon_dist.audit.cause import Cause, Factor, match_factor
from muon_dist.audit.convention import SCALES
from muon_dist.audit.directions import BLURRED, TIGHT, Judgement

# A gradient may be zero by accident once or twice.
ZEROS = 3
# Causes by which another rule trains the matrix: its length and decay then have no meaning.
OTHER_RULES = ("sgd", "adamw", "sign", "muon", "blurred")
# Causes by which each block has the factor of its own shape.
BLOCKS = ("by_shards", "by_blocks")
# Steps over which decay is averaged where the direction is blurred.
DECAY_STEPS = 4


@dataclass(frozen=True)
class Length:
    """One judged step of one matrix. shape: (out, in); zeros: number of zero gradients in a row, this one included."""

    name: str
    shape: tuple[int, int]
    asked: Asked
    judgement: Judgement
    factors: tuple[Factor, ...]
    zeros: int
    weight_eps: float

    @property
    def ratio(self) -> float:
        """Length of the update divided by the rate."""
        return self.judgement.fit.length / self.asked.lr

    @property
    def tolerance(self) -> float:
        """Tolerance of `ratio`: the fit's remainder may also have changed the length, by about as much."""
        return 0.01 + min(self.judgement.fit.left, BLURRED)


@dataclass(frozen=True)
class Scale:
    """The factor of the shape that an optimizer uses. settled: lengths showed it, or it was asked for."""

    name: str
    settled: bool


def tells_rate(judgement: Judgement) -> bool:
    """Whether the length in this judgement shows the rate."""
    return judgement.known and not any(c.name in (*OTHER_RULES, *BLOCKS) for c in judgement.causes)


def find_scale(lengths: Sequence[Length], before: Scale | None) -> Scale:
    """The factor of the shape that most matrices use at the asked rate; if none fits, the one whose rates agree."""
    if before is not None and before.settled:
        return before
    asked = next((e.asked.scale for e in lengths if e.asked.scale is not None), None)
    if asked is not None:
        return Scale(asked, True)
    if lengths and lengths[0].asked.rule == "adamw":
        return Scale("none", True)
    usable = [e for e in lengths if tells_rate(e.judgement) and e.zeros == 0 and e.ratio > 0]
    best, agreed = "spectral", 0
    for name, scale in SCALES.items():
        agree = sum(abs(math.log(e.ratio / scale(*e.shape))) <= e.tolerance for e in usable)
        if agree > agreed:
            best, agreed = name, agree
    if agreed:
        return Scale(best, agreed == len(usable) and len({e.shape for e in usable}) > 1)
    if len({e.shape for e in usable}) > 1:
        best = min(SCALES, key=lambda name: _spread([math.log(e.ratio / SCALES[name](*e.shape)) for e in usable]))
    return Scale(best, False)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def causes_of(length: Length, scale: Scale, all_ratios: Sequence[float]) -> tuple[Cause, ...]:
    """The causes shown by the length of one update and by its weight decay.

    Args:
        all_ratios: `Length.ratio` of all matrices with the same rate in this step, divided by their factors.
    """
    found: list[Cause] = []
    if not tells_rate(length.judgement):
        return ()
    ratio = length.ratio / SCALES[scale.name](*length.shape)
    tolerance = length.tolerance
    resting = Factor(
        Cause("rests", "comes to rest after zero gradients", "choice"), length.asked.momentum**length.zeros
    )
    right = abs(ratio) > 0 and ratio > 0 and abs(math.log(ratio)) <= tolerance
    if length.zeros >= ZEROS and right and length.asked.momentum > 0:
        found.append(Cause("zero_gradient", "a zero gradient keeps moving the weight at full length"))
    elif not right:
        found.append(_why(length, ratio, (*((resting,) if length.zeros else ()), *length.factors), all_ratios))
    return tuple(found)


def _why(length: Length, ratio: float, factors: Sequence[Factor], all_ratios: Sequence[float]) -> Cause:
    if ratio <= 0:
        return Cause("sign", "the update points the wrong way")
    cause = match_factor(ratio, factors, 2 * length.tolerance)
    if cause is not None:
        return cause
    rate, asked = ratio * length.asked.lr, length.asked.lr
    others = all(abs(math.log(r / ratio)) <= 2 * length.tolerance for r in all_ratios if r > 0)
    if others:
        return Cause("rate", f"rate {rate:.3g}, asked {asked:.3g}")
    return Cause("length", f"{ratio:.3g} times the length of an update at the rate asked for, {asked:.3g}")


class Decay:
    """The decay of one matrix over its last steps."""

    def __init__(self) -> None:
        self._fits: deque[tuple[float, float, float]] = deque(maxlen=DECAY_STEPS)

    def cause(self, length: Length, scale: Scale) -> Cause | None:
        """The cause for a wrong decay, as far as the fits can show it; None if the decay may be right.

        A part of the fit's remainder may be parallel to the weight. If the remainder is larger than fp32's rounding, a
        third of it may be, in the mean of several steps; otherwise all of it, in one step.
        """
        found, asked = length.judgement, length.asked.lr * length.asked.weight_decay
        # With an unknown direction the fitted decay would contain the direction's part along the weight.
        if not tells_rate(found) or length.asked.cautious:
            self._fits.clear()
            return None
        self._fits.append((found.fit.decay, asked, found.fit.doubt))
        decay, asked, doubt = (sum(values) / len(self._fits) for values in zip(*self._fits, strict=True))
        if found.fit.left > TIGHT:
            if len(self._fits) < DECAY_STEPS:
                return None
            doubt /= 3
        doubt += 0.02 * asked + 1e-9
        ratio = length.ratio / SCALES[scale.name](*length.shape)
        if abs(decay - asked) <= doubt or abs(decay - asked * ratio) <= doubt:
            return None
        if asked < length.weight_eps and length.weight_eps > 1e-4:
            lost = f"decay of {asked:.3g} in a step is below the rounding of the weight's dtype"
            return Cause("decay_rounded", lost, "choice")
        if abs(decay) <= doubt:
            return Cause("no_decay", f"decay missing: {asked:.3g} of the weight was asked in a step")
        if asked == 0:
            return Cause("decay", f"the weight decays by {decay:.3g} in a step, and no decay was asked")
        return Cause("decay", f"decay {decay:.3g} in a step, asked {asked:.3g}")
