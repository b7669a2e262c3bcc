"""The errors that the dtypes of a step explain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ITERATION = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.08}
"""Relative error of Newton-Schulz of a matrix of full rank against fp64: measured 1e-6, 2e-3 and .015 (256 x 256,
Keller's coefficients), times a margin of five or more for other shapes and orders of summation."""
_SPREAD = 4.0
"""Two iterations in one dtype differ from fp64 by errors of one size; their difference is within this many of them."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of a step of one matrix.

    Attributes:
        iteration: of Newton-Schulz; fp32 for AdamW.
        weight: of the tensor that the step writes: of the master, if there is one.
        state: of momentum, or of AdamW's moments.
        wire: in which look-ahead and update travel, if that is narrower than fp32.
        stochastic: weights are rounded stochastically.
        arithmetic: in which the update is computed outside the iteration: under AdamW that of the weight.
        rescaled: the weight is multiplied once more after decay and update.
    """

    iteration: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    stochastic: bool = False
    arithmetic: torch.dtype = torch.float32
    rescaled: bool = False


@dataclass(frozen=True)
class Tolerance:
    """Largest errors without an alarm.

    Attributes:
        momentum: of the new momentum, relative to what was added up.
        direction: of the update, relative to it.
        written: rounding of each weight when it is written, relative to the weight.
    """

    momentum: float
    direction: float
    written: float


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return float(torch.finfo(dtype).eps) / 2


def tolerance_of(precision: Precision, spread: float | None = None, wanted: float | None = None) -> Tolerance:
    """The tolerance of one audited matrix.

    Args:
        precision: see there.
        spread: relative difference of the plain step with its iteration in `precision.iteration`, on the matrix at
            hand, to the same in fp64; None before it was measured. Directions without momentum, which a matrix of low
            rank has, are rounding errors that the iteration brings to full size, so no constant can hold for all
            matrices.
        wanted: the user's tolerance of the update, in place of `direction`.

    Momentum: a lerp has three roundings, the gradient's factor one, a stored 16-bit moment another; with u the unit
    roundoff of the state, 8 u is above their sum. Direction: the constant of the dtype, four spreads, one rounding of
    each message and eight operations outside the iteration. Written: decay and update round once each, and a
    factor on the norm once more, u |w| at most.
    """
    direction = _ITERATION[precision.iteration] + 8 * unit(precision.arithmetic)
    if spread is not None:
        direction += _SPREAD * spread
    if precision.wire is not None:
        direction += 4 * unit(precision.wire)
    roundings = (4.0 if precision.stochastic else 2.0) + precision.rescaled
    return Tolerance(
        momentum=8 * unit(precision.state),
        direction=direction if wanted is None else wanted,
        written=roundings * unit(precision.weight),
    )
