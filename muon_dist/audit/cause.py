"""From a difference between two updates to a named cause.

Two kinds of evidence name a cause. A *direction* is the update that a known deviation would have made (orthogonalized
by shards, without Nesterov, ...): a deviation whose update equals the observed one explains it. A *factor* is a number
that somebody may have multiplied the update with (a clip coefficient, another rate, a world size): it explains an
update of the right direction and the wrong length. A cause is a fault, or a choice: other coefficients, another scale
convention, a lower precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["fault", "choice"]


@dataclass(frozen=True)
class Difference:
    """How one tensor differs from the tensor that was wanted.

    Attributes:
        error: ||got - want|| / ||want||, Frobenius norms; infinite if only `want` is zero.
        factor: <got, want> / <want, want>, the multiple of `want` that is nearest to `got`.
        angle: between the two, in radians, 0 to pi; 0 if both are zero.
    """

    error: float
    factor: float
    angle: float

    @classmethod
    def between(cls, got: Tensor, want: Tensor) -> Difference:
        """The difference of two tensors of one shape, in fp64. NaN or infinity in `got` makes `error` infinite."""
        got, want = got.detach().double().flatten(), want.detach().double().flatten()
        norm_got, norm_want = float(got.norm()), float(want.norm())
        if not math.isfinite(norm_got):
            return cls(math.inf, math.nan, math.nan)
        if norm_want == 0.0:
            same = norm_got == 0.0
            return cls(0.0 if same else math.inf, 1.0 if same else math.inf, 0.0 if same else math.pi / 2)
        if norm_got == 0.0:
            return cls(1.0, 0.0, math.pi / 2)
        # atan2 of the half-angle form: the arc cosine loses angles below 1e-8.
        x, y = got / norm_got, want / norm_want
        angle = 2 * math.atan2(float((x - y).norm()), float((x + y).norm()))
        factor = norm_got / norm_want * math.cos(angle)
        return cls(float((got - want).norm()) / norm_want, factor, angle)

    def against(self, scale: float) -> Difference:
        """The same update against `scale` times what was wanted."""
        if not math.isfinite(self.error) or scale == 1.0:
            return self
        cosine = math.cos(self.angle)
        ratio = self.factor / cosine / scale if abs(cosine) > 1e-12 else 0.0
        return Difference(math.sqrt(max(0.0, 1 + ratio**2 - 2 * ratio * cosine)), self.factor / scale, self.angle)

    @property
    def turn(self) -> float:
        """Relative error that is left after the best positive factor: sin(angle), and 1 beyond a right angle."""
        return math.sin(self.angle) if self.angle < math.pi / 2 else 1.0


@dataclass(frozen=True)
class Cause:
    """A named reason for a difference.

    Attributes:
        name: short and stable, such as "by_shards"; for tests and programs.
        sentence: for people, without a full stop.
        kind: "fault" or "choice".
    """

    name: str
    sentence: str
    kind: Kind = "fault"


@dataclass(frozen=True)
class Direction:
    """A known deviation, and the update that it would have made.

    Attributes:
        cause: what it is called.
        update: computes the update, in the shape of the observed one; called only if it is needed.
        tolerance: greatest `Difference.turn` at which this deviation explains an update; None for the caller's.
    """

    cause: Cause
    update: Callable[[], Tensor]
    tolerance: float | None = None


@dataclass(frozen=True)
class Factor:
    """A number by which the update may have been multiplied, 1 being right, and what it would mean."""

    cause: Cause
    value: float


@dataclass(frozen=True)
class Verdict:
    """The explanation of an observed update.

    Attributes:
        difference: of the observed update to the wanted one.
        causes: none if the update is right, or if nothing known explains it.
        right: the error is within the tolerance.
        left: turn that the causes leave unexplained.
    """

    difference: Difference
    causes: tuple[Cause, ...]
    right: bool
    left: float

    @property
    def sentence(self) -> str:
        """Such as "update 39% off: orthogonalized by shards"; the empty string if the update is right."""
        if self.right:
            return ""
        names = ", ".join(c.sentence for c in self.causes) or "no known cause"
        return f"{size_of(self.difference)}: {names}"


def size_of(difference: Difference) -> str:
    """The difference of an update in words: a factor if its direction is right, else a percentage."""
    if not math.isfinite(difference.error):
        return "update is not finite" if math.isnan(difference.factor) else "update where there should be none"
    if difference.factor == 0.0:
        return "no update"
    if difference.angle > 0.75 * math.pi:
        return "update points the wrong way"
    if difference.turn < 0.25 * difference.error and abs(difference.factor - 1) > 0.005:
        if 0.5 < difference.factor < 2:
            return f"{difference.factor:.3g} times the length"
        ratio = max(difference.factor, 1 / difference.factor)
        return f"{ratio:.3g} times too {'large' if difference.factor > 1 else 'small'}"
    percent = 100 * difference.error
    return f"update {percent:.0f}% off" if percent >= 1 else f"update {percent:.1g}% off"


def match_factor(value: float, factors: Iterable[Factor], tolerance: float) -> Cause | None:
    """The cause whose factor is nearest to `value` in ratio, within `tolerance`; None without one, or for 1."""
    if not value > 0 or abs(math.log(value)) <= tolerance:
        return None
    known = [f for f in factors if f.value > 0 and abs(math.log(f.value)) > tolerance]
    nearest = min(known, key=lambda f: abs(math.log(value / f.value)), default=None)
    if nearest is None or abs(math.log(value / nearest.value)) > tolerance:
        return None
    return nearest.cause


@torch.no_grad()
def explain(
    got: Tensor,
    want: Tensor,
    *,
    directions: Iterable[Direction] = (),
    factors: Sequence[Factor] = (),
    tolerance: float,
) -> Verdict:
    """Why the update `got` is not `want`.

    Args:
        got, want: of one shape, without weight decay.
        directions: deviations to try, likelier ones first: the first that explains the update is taken.
        factors: numbers that may stand before the update.
        tolerance: relative error that the dtypes of the step explain.

    An update of the right direction is explained by a factor alone; another by a direction, and by a factor as well if
    its length differs from that direction's.
    """
    seen = Difference.between(got, want)
    if seen.error <= tolerance:
        return Verdict(seen, (), True, seen.turn)
    if seen.turn <= tolerance:
        cause = match_factor(seen.factor, factors, 2 * tolerance)
        return Verdict(seen, (cause,) if cause else (), False, seen.turn)
    for direction in directions:
        limit = tolerance if direction.tolerance is None else direction.tolerance
        rest = Difference.between(got, direction.update())
        if rest.turn <= limit:
            more = match_factor(rest.factor, factors, 2 * limit)
            return Verdict(seen, (direction.cause, more) if more else (direction.cause,), False, rest.turn)
    return Verdict(seen, (), False, seen.turn)
