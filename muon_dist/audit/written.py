"""Compares the weight that a step has written with the weight that it should have written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muon_dist.audit.recompute import Hyperparameters, Step
from muon_dist.audit.tolerance import Precision, Tolerance, unit


def fit(rest: Tensor, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """(a, b, norm of the remainder, condition) of the least-squares fit rest = a x + b y, in fp64.

    The coefficient of a zero vector is 0. Errors of `a` and `b` are `condition` times as large as for orthogonal x and
    y.
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


@dataclass(frozen=True)
class Written:
    """A written weight, or a part of it, compared with the wanted weight.

    Attributes:
        old, got, want: the weight before the step, after the step, and the wanted weight after the step.
        update: the tensor that should have been subtracted.
        decay: factor on the old weight, a number or a tensor of its shape.
        lost: 1 - decay, for decayed elements.
        a, b: got - want = a old - b update + remainder; for cautious decay `old` only has the decayed elements. So the
            update was 1 + b times the wanted update.
        left: norm of the remainder, divided by the norm of the update.
        error: norm of got - want, divided by the norm of the update.
        bound: largest allowed `error`.
        bound_a, bound_b: largest allowed |a| and |b|; small, because rounding errors of many elements nearly cancel.
        hidden: share of the decay that the rounding of a 16-bit weight may hide.
        rate: factor on the update.
        wide: the weight is stored in more than 16 bits.
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
    hidden: float = 0.02
    rate: float = 1.0
    wide: bool = True

    @classmethod
    def of(
        cls, old: Tensor, got: Tensor, step: Step, asked: Hyperparameters, precision: Precision, limit: Tolerance
    ) -> Written:
        """The comparison for a whole matrix."""
        made = cls.part(old, got, step.rate * step.direction, step.decay, asked, precision, limit)
        return replace(made, rate=step.rate or 1.0)

    @classmethod
    def part(
        cls, old: Tensor, got: Tensor, update: Tensor, decay: Tensor | float, asked: Hyperparameters,
        precision: Precision, limit: Tolerance,
    ) -> Written:  # fmt: skip
        """The comparison for any part of a matrix; all tensors have the shape of the part."""
        old, got, update = old.double(), got.double(), update.double()
        decay, decayed = (decay.double() if isinstance(decay, Tensor) else decay), old
        if isinstance(decay, Tensor) and bool((decay < decay.max()).any()):
            decayed = torch.where(decay < decay.max(), old, 0.0)
        lost = 1 - float(decay.min() if isinstance(decay, Tensor) else decay)
        want = decay * old - update
        if precision.weight.itemsize < 4 and not precision.stochastic and not asked.rescales:
            # Rounding of a 16-bit weight can lose the decay: this is an effect of the dtype, not a fault.
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
        hidden = 0.2 if precision.weight.itemsize < 4 else 0.02
        bound = limit.direction + noise / size
        bound_b = limit.direction + 6 * noise / (size * root)
        bound_a = math.inf
        if weight > 0:
            share, rounding = max(10 / root, 0.02), 6 / root
            if asked.rescales:  # its factor on the old weight depends on the written weight
                share = rounding = 1.0
            bound_a = rounding * limit.written + limit.direction * size / weight * share
            # Weight decay has two errors that are equal in all elements, so they do not cancel. Its factor is rounded
            # to fp32, by at most u / 2. And close to 1 all products are rounded in the same direction, by at most u.
            bound_a += 1.5 * unit(torch.promote_types(precision.weight, torch.float32))
        error = float(rest.norm()) / size
        bound_a, bound_b = condition * bound_a, condition * bound_b
        return cls(
            old, got, want, update, decay, lost, a, b, left / size, error, bound, bound_a, bound_b, hidden, 1.0,
            precision.weight.itemsize >= 4,
        )  # fmt: skip

    @property
    def rounded(self) -> str:
        """Name of the 16-bit dtype to which a wider weight was rounded; the empty string if it was not."""
        return rounded_to(self.got) if self.wide else ""

    @property
    def off_a(self) -> bool:
        """Whether the old weight was multiplied by a wrong factor."""
        return abs(self.a) > max(self.bound_a, self.hidden * self.lost)

    @property
    def off_b(self) -> bool:
        """Whether the update was multiplied by a wrong factor."""
        return abs(self.b) > self.bound_b

    @property
    def wrong(self) -> bool:
        """Whether rounding does not explain the difference."""
        return not math.isfinite(self.error) or self.error > self.bound or self.off_a or self.off_b


def rounded_to(tensor: Tensor) -> str:
    """Name of the 16-bit dtype that holds every element of a tensor; the empty string if none does."""
    for dtype in (torch.bfloat16, torch.float16):
        if bool(tensor.any()) and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return str(dtype).removeprefix("torch.")
    return ""
