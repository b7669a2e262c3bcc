"""The errors that the dtypes of a step explain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ITERATION = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.08}
"""Largest relative error of Newton-Schulz against fp64, for a matrix of full rank, by dtype. Measured: 1e-6, 2e-3 and
0.015 (256 x 256, Keller's coefficients); times a margin of five or more for other shapes and orders of summation."""
_SPREAD = 4.0
"""Two iterations in one dtype have errors of equal size; their difference is at most this many times one error."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of a step of one matrix.

    Attributes:
        iteration: dtype of Newton-Schulz; fp32 for AdamW.
        weight: dtype of the tensor that the step writes: the master if there is one.
        state: dtype of momentum, or of AdamW's moments.
        wire: dtype of sent look-aheads and updates, if narrower than fp32.
        stochastic: weights are rounded stochastically.
        arithmetic: dtype of the arithmetic outside the iteration; for AdamW the weight's dtype.
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
        momentum: error of the new momentum, relative to its summands.
        direction: error of the update, relative to the update.
        written: rounding of each written weight, relative to the weight.
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
        precision: the dtypes of the step.
        spread: for this matrix, the relative difference between the plain step with its iteration in
            `precision.iteration` and the same step in fp64; None if not measured. It is needed because in a matrix of
            low rank the iteration brings rounding errors to full size, so that no constant fits all matrices.
        wanted: the user's tolerance of the update, instead of `direction`.

    Momentum: a lerp has three roundings, the gradient's factor one, a stored 16-bit moment another one. With u the
    unit roundoff of the state, 8 u is larger than their sum. Direction: the constant of the dtype, four spreads, one
    rounding per message and eight operations outside the iteration. Written: decay and update round once each, and a
    factor on the norm once more, at most u |w| each.
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
