"""The largest effect of dtype rounding on the step of one matrix."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from muon_dist.audit.recompute import Before, Hyperparameters, Step, plain_step
from muon_dist.audit.tolerance import Precision
from muon_dist.optim.reference import plain_newton_schulz


def spread_of(wide: Before, asked: Hyperparameters, momentum: Tensor, precision: Precision, step: Step) -> float:
    """Error of the whole step in narrow dtypes, relative to the norm of the update.

    Args:
        wide: the inputs in fp64.
        momentum: the momentum after the step, in fp64.
        step: the plain step in fp64.
    """
    narrow = _narrow(wide, asked, momentum, precision)
    update = float((step.rate * step.direction).norm())
    return float((_moved(wide, narrow) - _moved(wide, step)).norm()) / update if update > 0 else 0.0


def _narrow(wide: Before, asked: Hyperparameters, momentum: Tensor, precision: Precision) -> Step:
    """The step in the optimizer's dtypes: messages and iteration are rounded, all else is in fp32."""

    def rounded(x: Tensor) -> Tensor:
        return x.float() if precision.wire is None else x.to(precision.wire).float()

    def iteration(x: Tensor) -> Tensor:
        norm = x.norm()
        x = (x / norm if norm > 0 else x).to(precision.iteration)
        return plain_newton_schulz(x, asked.ns_steps, asked.ns_schedule).float()

    memory = {name: value.float() for name, value in wide.memory.items()}
    gradient, sent = rounded(wide.gradient * asked.gradient_factor), rounded(momentum)
    if asked.rule == "adamuon":
        # The sign of a sum that nearly cancels is random: set it to zero, so that the spread includes it.
        gradient, sent = _without_cancelled(gradient, sent, asked)
    before = Before(wide.weight.float(), gradient, wide.momentum.float(), memory)
    return plain_step(before, replace(asked, gradient_factor=1.0), iteration, sent)


def _without_cancelled(gradient: Tensor, momentum: Tensor, asked: Hyperparameters) -> tuple[Tensor, Tensor]:
    if not asked.nesterov:
        return gradient, momentum
    x, y = (1 - asked.momentum) * gradient.double(), asked.momentum * momentum.double()
    sure = (x + y).abs() > 4e-7 * (x.abs() + y.abs())
    return gradient * sure, momentum * sure


def _moved(before: Before, step: Step) -> Tensor:
    """The change that a step subtracts from a weight, in fp64."""
    return (1 - step.decay) * before.weight.double() + step.rate * step.direction.double()
