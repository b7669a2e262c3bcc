"""One optimizer step of one matrix in plain lines, on whole tensors: what every audited step must equal.

Nothing here is shared with the optimizer's own step except the tables of Newton-Schulz coefficients. All functions
compute in the dtype of the tensors that they get and change none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muon_dist.optim.reference import plain_newton_schulz

MUON_RULES = ("muon", "normuon", "hyperball", "namo")


@dataclass(frozen=True)
class Hyperparameters:
    """What a step is asked to do.

    Attributes:
        rule: one of `MUON_RULES`, or "adamw".
        lr: learning rate of this step.
        weight_decay: decoupled, times lr.
        momentum: decay of the momentum buffer.
        nesterov: orthogonalize the look-ahead, not the momentum.
        ns_steps, ns_schedule: of Newton-Schulz.
        scale: "match_rms_adamw", "spectral" or "none".
        transposed: the matrix is stored (in, out).
        options: of the rule: "beta2" and "eps" of normuon, "mu2" and "eps" of namo.
        betas, eps: of AdamW.
        gradient_factor: multiplies the raw gradient before momentum.
        rest: multiplies the direction; below 1 while the gradient of a matrix stays exactly zero.
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
    options: Mapping[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    gradient_factor: float = 1.0
    rest: float = 1.0


@dataclass(frozen=True)
class Before:
    """A matrix before the step.

    Attributes:
        weight, gradient: (rows, cols); the gradient is raw, before `gradient_factor`.
        momentum: (rows, cols); of AdamW, the first moment.
        memory: what the rule remembers beside momentum: "row_second_moment" (out,) of normuon; "radius" () of
            hyperball, zero or missing before the first step; "gradient_second_moment" and "gradient_steps" () of
            namo; "exp_avg_sq" and "step" of AdamW.
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
        rate: learning rate times scale. decay: of the old weight. Of hyperball both with the factor that brings the
            weight back to its norm.
        weight: after the step, `decay * weight - rate * direction`.
        memory: after the step, under the names of `Before.memory`.
    """

    momentum: Tensor
    direction: Tensor
    scale: float
    rate: float
    decay: float
    weight: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


Iteration = Callable[[Tensor], Tensor]
"""Orthogonalizes a matrix (rows, cols)."""


def scale_factor(kind: str, rows: int, cols: int, transposed: bool = False) -> float:
    """The factor of `scale`, from the shape alone. match_rms_adamw: arXiv 2502.16982, section 2.2; spectral: Keller
    Jordan's. Raises KeyError for another kind."""
    out, fan_in = (cols, rows) if transposed else (rows, cols)
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)),
        "spectral": math.sqrt(max(1.0, out / fan_in)),
        "none": 1.0,
    }[kind]


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

    gradient = before.gradient * asked.gradient_factor
    if momentum is None:
        momentum = asked.momentum * before.momentum + (1 - asked.momentum) * gradient
    return _RULES[asked.rule](before, asked, gradient, momentum, orthogonalized)


def _sent(gradient: Tensor, momentum: Tensor, asked: Hyperparameters) -> Tensor:
    """What is orthogonalized: the look-ahead U = mu B + (1 - mu) G, or the momentum B."""
    return asked.momentum * momentum + (1 - asked.momentum) * gradient if asked.nesterov else momentum


def _muon(before: Before, asked: Hyperparameters, gradient: Tensor, momentum: Tensor, ns: Iteration) -> Step:
    """Keller Jordan's: W <- W (1 - lr wd) - lr scale O."""
    direction = asked.rest * ns(_sent(gradient, momentum, asked))
    return _applied(before, asked, momentum, direction, {})


def _normuon(before: Before, asked: Hyperparameters, gradient: Tensor, momentum: Tensor, ns: Iteration) -> Step:
    """arXiv 2510.05491, algorithm 1: v_i = lerp(v_i, mean_j O_ij^2); N = O / (sqrt(v) + eps), with the norm of O."""
    o = ns(_sent(gradient, momentum, asked))
    inputs = 0 if asked.transposed else 1
    beta2, eps = asked.options["beta2"], asked.options["eps"]
    v = beta2 * before.memory["row_second_moment"] + (1 - beta2) * o.square().mean(dim=inputs)
    divided = o / (v.sqrt() + eps).unsqueeze(inputs)
    direction = asked.rest * divided * (o.norm() / (divided.norm() + eps))
    return _applied(before, asked, momentum, direction, {"row_second_moment": v})


def _hyperball(before: Before, asked: Hyperparameters, gradient: Tensor, momentum: Tensor, ns: Iteration) -> Step:
    """arXiv 2606.16899: W' = W - lr R u / norm(u); W <- R W' / norm(W'); R is the norm of the first weight."""
    radius = before.memory.get("radius")
    if radius is None or not bool(radius > 0):
        radius = before.weight.norm()
    radius = radius.to(before.weight.dtype)
    o = ns(_sent(gradient, momentum, asked))
    length = o.norm()
    direction = asked.rest * radius * o / length if length > 0 else torch.zeros_like(o)
    moved = before.weight - asked.lr * direction
    back = float(radius / moved.norm())
    return Step(momentum, direction, 1.0, back * asked.lr, back, back * moved, {"radius": radius})


def _namo(before: Before, asked: Hyperparameters, gradient: Tensor, momentum: Tensor, ns: Iteration) -> Step:
    """arXiv 2602.17080, algorithm 1: one adaptive length alpha for the matrix; W <- W - lr alpha (O + wd W)."""
    mu2, eps = asked.options["mu2"], asked.options["eps"]
    steps = float(before.memory["gradient_steps"]) + 1
    v = mu2 * before.memory["gradient_second_moment"] + (1 - mu2) * gradient.norm() ** 2
    correction = math.sqrt(1 - mu2**steps) / (1 - asked.momentum**steps)
    alpha = float(correction * momentum.norm() / (v.sqrt() + eps))
    memory = {"gradient_second_moment": v, "gradient_steps": torch.as_tensor(steps)}
    direction = alpha * ns(momentum)
    return _applied(before, asked, momentum, direction, memory, decay=1 - asked.lr * alpha * asked.weight_decay)


def _applied(
    before: Before,
    asked: Hyperparameters,
    momentum: Tensor,
    direction: Tensor,
    memory: Mapping[str, Tensor],
    decay: float | None = None,
) -> Step:
    decay = 1 - asked.lr * asked.weight_decay if decay is None else decay
    scale = scale_factor(asked.scale, direction.size(0), direction.size(1), asked.transposed)
    weight = decay * before.weight - asked.lr * scale * direction
    return Step(momentum, direction, scale, asked.lr * scale, decay, weight, memory)


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


_RULES = {"muon": _muon, "normuon": _normuon, "hyperball": _hyperball, "namo": _namo}
