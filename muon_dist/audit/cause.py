"""Finds a named cause for the difference between two updates.

There are two kinds of evidence. A *direction* is the update of a known deviation (orthogonalized by shards, without
Nesterov, ...): it explains an observed update that is equal to it. A *factor* is a number that may have multiplied the
update by mistake (a clip coefficient, another rate, a world size): it explains an update with the right direction and
the wrong length. A cause is a fault or a choice: other coefficients, another scale convention, a lower precision.
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
    """The difference between an observed tensor `got` and the wanted tensor `want`.

    Attributes:
        error: ||got - want|| / ||want||, Frobenius norms; infinite if only `want` is zero.
        factor: <got, want> / <want, want>, the multiple of `want` that is nearest to `got`.
        angle: angle between the two, in radians, 0 to pi; 0 if both are zero.
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
        # atan2 in half-angle form, because the arc cosine loses angles below 1e-8.
        x, y = got / norm_got, want / norm_want
        angle = 2 * math.atan2(float((x - y).norm()), float((x + y).norm()))
        factor = norm_got / norm_want * math.cos(angle)
        return cls(float((got - want).norm()) / norm_want, factor, angle)

    def against(self, scale: float) -> Difference:
        """The difference of the same update from `scale` times the wanted tensor."""
        if not math.isfinite(self.error) or scale == 1.0:
            return self
        cosine = math.cos(self.angle)
        ratio = self.factor / cosine / scale if abs(cosine) > 1e-12 else 0.0
        return Difference(math.sqrt(max(0.0, 1 + ratio**2 - 2 * ratio * cosine)), self.factor / scale, self.angle)

    @property
    def turn(self) -> float:
        """Relative error after the best positive factor: sin(angle), or 1 beyond a right angle."""
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
        cause: the cause that it shows.
        update: computes the update, in the shape of the observed update; called only if needed.
        tolerance: largest `Difference.turn` at which it explains an observed update; None: the caller's tolerance.
    """

    cause: Cause
    update: Callable[[], Tensor]
    tolerance: float | None = None


@dataclass(frozen=True)
class Factor:
    """A number that may have multiplied the update (1 is right), and the cause that it would show."""

    cause: Cause
    value: float


@dataclass(frozen=True)
class Verdict:
    """The explanation of an observed update.

    Attributes:
        difference: the difference of the observed update from the wanted update.
        causes: empty if the update is right, or if no known cause explains it.
        right: whether the error is within the tolerance.
        left: the part of `Difference.turn` that the causes do not explain.
    """

    difference: Difference
    causes: tuple[Cause, ...]
    right: bool
    left: float

    @property
    def sentence(self) -> str:
        """Text such as "update 39% off: orthogonalized by shards"; empty if the update is right."""
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
    """The cause whose factor is nearest to `value`, within relative `tolerance`; None if none matches, or 1 does."""
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
    """The explanation why the update `got` differs from `want`.

    Args:
        got, want: updates of one shape, without weight decay.
        directions: deviations to try, likely ones first: the first that explains the update is used.
        factors: numbers that may have multiplied the update.
        tolerance: relative error that the dtypes of the step explain.

    If the direction is right, a factor explains the update. Otherwise a direction explains it, together with a factor
    if the lengths differ.
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
