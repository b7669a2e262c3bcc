"""The reference step of a whole matrix or AdamW parameter, with which audited steps are compared.

Muon's rules come from `optim.plain`; this module converts stored matrices to the (out, in) of the papers, and back. It
shares nothing with the optimizer's step except the tables of Newton-Schulz coefficients. All functions compute in the
dtype of their arguments, and do not change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muon_dist.optim import plain
from muon_dist.optim.reference import plain_newton_schulz

_MATRICES = ("update_second_moment", "projected_second_moment")
_NUMBERS = ("gradient_second_moment", "gradient_steps", "basis_steps")
_SQUARES = ("row_covariance", "column_covariance", "row_basis", "column_basis")
BASES = _SQUARES[2:]
"""Bases of soap_muon. They depend on the last bit of the covariance, so only their effect is compared."""


@dataclass(frozen=True)
class Hyperparameters:
    """The options of a step.

    Attributes:
        rule: one of `optim.plain.DEFAULTS`, or "adamw".
        lr: learning rate of this step.
        weight_decay: decoupled, times lr.
        momentum: decay of the momentum buffer.
        nesterov: orthogonalize the look-ahead, not the momentum.
        ns_steps, ns_schedule: options of Newton-Schulz.
        scale: the option `scale`.
        transposed: the matrix is stored (in, out).
        options: `rule_options` of the rule and of its parts.
        betas, eps: options of AdamW.
        gradient_factor: multiplies the raw gradient before momentum.
        rest: multiplies the direction; below 1 while the gradient of a matrix stays exactly zero.
        plain_momentum: False for a user-defined rule with another momentum.
    """

    rule: str = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_schedule: str = "keller"
    scale: str = "match_rms_adamw"
    transposed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    gradient_factor: float = 1.0
    rest: float = 1.0
    plain_momentum: bool = True

    @property
    def known(self) -> bool:
        """Whether the rule has a plain form; a user-defined rule has none."""
        return self.rule == "adamw" or self.rule in plain.DEFAULTS

    @property
    def rescales(self) -> bool:
        """Whether the step ends with a factor that depends on the norm of the new weight."""
        return self.rule == "hyperball" or "radial_brake" in self.options


@dataclass(frozen=True)
class Before:
    """A matrix before the step.

    Attributes:
        weight, gradient: (rows, cols); the gradient is raw, before `gradient_factor`.
        momentum: (rows, cols); for AdamW the first moment.
        memory: the rule's other state, by its names in the state, flat, in the stored orientation; zero before the
            first step. For AdamW "exp_avg_sq" and "step".
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A matrix after the step, and the parts of the step.

    Attributes:
        momentum: the momentum after the step.
        direction: (rows, cols); the rule's update, before learning rate and scale.
        scale: the factor of `scale` on the direction.
        rate: learning rate times scale. decay: factor on the old weight, a number or (rows, cols). Both include the
            factor on the norm, if the rule or a part has one; see `optim.plain.Stages`.
        weight: the weight after the step, `decay * weight - rate * direction`.
        memory: the memory after the step, under the names of `Before.memory`.
    """

    momentum: Tensor
    direction: Tensor
    scale: float
    rate: float
    decay: Tensor | float
    weight: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


Iteration = Callable[[Tensor], Tensor]
"""Orthogonalizes a matrix (rows, cols)."""


def scale_factor(kind: str, rows: int, cols: int, transposed: bool = False) -> float:
    """The factor of `scale`, from the stored shape. Raises KeyError for an unknown kind."""
    return plain.plain_scale(kind, *((cols, rows) if transposed else (rows, cols)))


def plain_step(
    before: Before,
    asked: Hyperparameters,
    iteration: Iteration | None = None,
    momentum: Tensor | None = None,
    memory: Mapping[str, Tensor] | None = None,
) -> Step:
    """The step of one matrix or, with rule "adamw", of one tensor of any shape.

    Args:
        iteration: orthogonalizes a matrix; by default `plain_newton_schulz` in the dtype of the tensors.
        momentum, memory: tensors to compute the update from, instead of those computed here. With the optimizer's
            tensors, an error in them is not reported again in the update. Of `memory` only AdamW's "exp_avg_sq" is
            used.

    Raises:
        KeyError: the rule or scale is unknown, or `before` lacks memory that the rule needs.
    """
    if asked.rule == "adamw":
        return _adamw(before, asked, momentum, memory or {})

    def orthogonalized(x: Tensor) -> Tensor:
        if iteration is not None:
            return iteration(x)
        return plain_newton_schulz(x, asked.ns_steps, asked.ns_schedule)

    def turned(x: Tensor) -> Tensor:
        return x.mT if asked.transposed else x

    weight, kept = turned(before.weight).clone(), _for_plain(before, asked.transposed)
    made = plain.plain_step(
        weight, turned(before.gradient * asked.gradient_factor), kept, asked.rule,
        lr=asked.lr, weight_decay=asked.weight_decay, momentum=asked.momentum, rest=asked.rest,
        orthogonalize=orthogonalized, made_of=None if momentum is None else turned(momentum),
        nesterov=asked.nesterov, scale=asked.scale, **asked.options,
    )  # fmt: skip
    decay = turned(made.decay) if isinstance(made.decay, Tensor) else made.decay
    return Step(
        turned(made.momentum), turned(made.direction), made.scale, made.rate, decay, turned(weight),
        _from_plain(kept, asked.transposed),
    )  # fmt: skip


def _for_plain(before: Before, transposed: bool) -> plain.Memory:
    """Copies of the rule's memory of a stored matrix, in the form of `optim.plain`; other entries are left out."""
    found: plain.Memory = {"momentum_buffer": before.momentum.mT if transposed else before.momentum}
    for name, value in before.memory.items():
        if name in _MATRICES:
            whole = value.view(before.weight.shape)
            found[name] = whole.mT.clone() if transposed else whole.clone()
        elif name in _SQUARES:  # fp32, as in the state
            side = math.isqrt(value.numel())
            found[_stored(name, transposed)] = value.view(side, side).float().clone()
        elif name in _NUMBERS:
            found[name] = float(value)
        elif name == "row_second_moment":
            found[name] = value.view(-1, 1)
        elif name == "radius" and bool(value > 0):
            found[name] = value
    return found


def _from_plain(memory: plain.Memory, transposed: bool) -> dict[str, Tensor]:
    found = {}
    for name, value in memory.items():
        tensor = torch.as_tensor(value)
        found[_stored(name, transposed)] = tensor.mT if transposed and name in _MATRICES else tensor
    return found


def _stored(name: str, transposed: bool) -> str:
    """The name in the state; if the matrix is stored (in, out), names of rows and columns are exchanged."""
    if not transposed or name not in _SQUARES:
        return name
    side, _, what = name.partition("_")
    return f"{'column' if side == 'row' else 'row'}_{what}"


def _adamw(before: Before, asked: Hyperparameters, momentum: Tensor | None, memory: Mapping[str, Tensor]) -> Step:
    """Loshchilov and Hutter (arXiv 1711.05101), with the bias corrections of Adam (arXiv 1412.6980, algorithm 1)."""
    beta1, beta2 = asked.betas
    steps = float(before.memory["step"]) + 1
    gradient = before.gradient * asked.gradient_factor
    first = beta1 * before.momentum + (1 - beta1) * gradient if momentum is None else momentum
    second = memory.get("exp_avg_sq")
    if second is None:
        second = beta2 * before.memory["exp_avg_sq"] + (1 - beta2) * gradient * gradient
    corrected = (second / (1 - beta2**steps)).sqrt() + asked.eps
    direction = first / (1 - beta1**steps) / corrected
    decay = 1 - asked.lr * asked.weight_decay
    weight = decay * before.weight - asked.lr * direction
    after = {"exp_avg_sq": second, "step": torch.as_tensor(steps)}
    return Step(first, direction, 1.0, asked.lr, decay, weight, after)
