"""One optimizer step of a whole matrix or AdamW parameter, with which every audited step is compared.

Muon's rules are those of `optim.plain`; here a matrix as it is stored becomes the (out, in) of the papers, and back.
Nothing is shared with the optimizer's own step except the tables of Newton-Schulz coefficients. All functions compute
in the dtype of the tensors that they get and change none of them.
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
"""Of soap_muon. An eigenvector depends on the last bit of its covariance: what is compared is what a basis does."""


@dataclass(frozen=True)
class Hyperparameters:
    """The options of a step.

    Attributes:
        rule: one of `optim.plain.DEFAULTS`, or "adamw".
        lr: learning rate of this step.
        weight_decay: decoupled, times lr.
        momentum: decay of the momentum buffer.
        nesterov: orthogonalize the look-ahead, not the momentum.
        ns_steps, ns_schedule: of Newton-Schulz.
        scale: as the option of that name.
        transposed: the matrix is stored (in, out).
        options: `rule_options`: of the rule and of its parts.
        betas, eps: of AdamW.
        gradient_factor: multiplies the raw gradient before momentum.
        rest: multiplies the direction; below 1 while the gradient of a matrix stays exactly zero.
        plain_momentum: False for a registered rule that remembers in its own way.
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
        """Whether the rule has a plain form; a registered one has none."""
        return self.rule == "adamw" or self.rule in plain.DEFAULTS

    @property
    def rescales(self) -> bool:
        """Whether the step ends with a factor that follows from the norm of the new weight."""
        return self.rule == "hyperball" or "radial_brake" in self.options


@dataclass(frozen=True)
class Before:
    """A matrix before the step.

    Attributes:
        weight, gradient: (rows, cols); the gradient is raw, before `gradient_factor`.
        momentum: (rows, cols); of AdamW, the first moment.
        memory: what the rule remembers besides momentum, by its names in the state, flat and as the matrix is stored;
            zero before the first step. "exp_avg_sq" and "step" of AdamW.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A matrix after the step, and the parts of the step.

    Attributes:
        momentum: after the step.
        direction: (rows, cols); the rule's update, before learning rate and scale.
        scale: factor of `scale` on the direction.
        rate: learning rate times scale. decay: of the old weight, a number or (rows, cols). Both with the factor on
            the norm, if the rule or a part has one; see `optim.plain.Stages`.
        weight: after the step, `decay * weight - rate * direction`.
        memory: after the step, under the names of `Before.memory`.
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
    """The factor of `scale`, from the stored shape. Raises KeyError for another kind."""
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
        iteration: what orthogonalizes; by default `plain_newton_schulz` in the dtype of the tensors.
        momentum, memory: what the update is made of, in place of what is computed here. With those that the optimizer
            has computed, an error in them does not show again in the update. Of `memory` AdamW's "exp_avg_sq" counts.

    Raises:
        KeyError: an unknown rule or scale, or memory that the rule needs and `before` lacks.
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
    """The memory of a stored matrix as `optim.plain` has it; copies. What other things remember is left out."""
    found: plain.Memory = {"momentum_buffer": before.momentum.mT if transposed else before.momentum}
    for name, value in before.memory.items():
        if name in _MATRICES:
            whole = value.view(before.weight.shape)
            found[name] = whole.mT.clone() if transposed else whole.clone()
        elif name in _SQUARES:  # fp32, as the state has them
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
    """The name in the state: of a matrix that is stored (in, out), the rows are the inputs."""
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
