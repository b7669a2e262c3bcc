"""Every update rule and part as its source states it, for one whole matrix. Shares no code with `rules`.

Tests, the fuzzer and the audit compare the optimizer with this code. A matrix is (out, in), as in the papers. The
arithmetic uses the dtype of the tensors: tests pass fp64, the audit first passes fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.optim.reference import plain_newton_schulz

Memory = dict[str, Any]
"""A rule's state for one matrix, by the names in the optimizer's state; empty before the first step."""
Orthogonalize = Callable[[Tensor], Tensor]

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "muon": {"scale": "match_rms_adamw"},
    "normuon": {"scale": "match_rms_adamw", "beta2": 0.95, "eps": 1e-10},
    "adamuon": {"scale": "match_rms_adamw", "beta2": 0.95, "eps": 1e-8},
    "soap_muon": {"scale": "match_rms_adamw", "beta2": 0.9, "frequency": 10},
    "hyperball": {"scale": "none"},
    "namo": {"scale": "none", "nesterov": False, "mu2": 0.99, "eps": 1e-8},
}
"""Per rule, the options whose defaults differ from Muon's."""


@dataclass(frozen=True)
class Stages:
    """The stages of a step: the new weight is `decay` times the old one, minus `rate` times `direction`.

    Attributes:
        momentum: (out, in), after the step.
        direction: (out, in), the rule's update with its parts, before learning rate and scale.
        scale: the factor of the option `scale`.
        rate: learning rate times scale. With hyperball or radial_brake also times the factor on the norm.
        decay: factor on the old weight, including the factor on the norm; (out, in) if cautious, else a number.
    """

    momentum: Tensor
    direction: Tensor
    scale: float
    rate: float
    decay: Tensor | float


def plain_step(
    weight: Tensor,
    gradient: Tensor,
    memory: Memory,
    rule: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    rest: float = 1.0,
    orthogonalize: Orthogonalize = plain_newton_schulz,
    made_of: Tensor | None = None,
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Stages:
    """One step of one matrix, in place; returns its stages.

    Args:
        weight, gradient: (out, in), of one dtype.
        memory: the rule's state; changed in place.
        rule: a key of `DEFAULTS`.
        rest: factor on the update while the gradient is exactly zero (momentum ** steps); otherwise 1.
        orthogonalize: function of an (out, in) tensor; by default five of Keller Jordan's steps.
        made_of: momentum after the step, to compute the update from; None: the momentum computed here.
        rounded: applied to SOAP's covariances and projections before they are used; a fuzzer adds noise there.
        options: `scale`, `nesterov`, and any of `rule_options`, parts included.
    """
    o = {"nesterov": True, **DEFAULTS[rule], **options}
    start = weight.clone()
    m = momentum * memory.get("momentum_buffer", 0.0) + (1 - momentum) * gradient if made_of is None else made_of
    memory["momentum_buffer"] = m
    look_ahead = (1 - momentum) * gradient + momentum * m if o["nesterov"] else m
    ns = _with_parts(orthogonalize, o)
    strength = 1.0
    if rule == "muon":
        update = ns(look_ahead)
    elif rule == "normuon":
        update = _normuon(ns(look_ahead), memory, o)
    elif rule == "adamuon":
        update = _adamuon(ns(look_ahead.sign()), memory, o)
    elif rule == "soap_muon":
        update = ns(_soap(look_ahead, gradient, memory, o, rounded))
    elif rule == "namo":
        strength = _namo(gradient, m, momentum, memory, o)
        update = strength * ns(m)
        rest = 1.0  # the update is already proportional to the momentum
    else:
        direction, back = _hyperball(weight, ns(look_ahead), lr, rest, memory)
        return Stages(m, direction, 1.0, back * lr, back)
    scale = plain_scale(o["scale"], *weight.shape)
    step = scale * update
    if "row_floor" in o:
        step = _row_floor(step, start, o["row_floor"])
    step = rest * step
    decay: Tensor | float = 1 - lr * strength * weight_decay
    if o.get("cautious"):
        decay = torch.where(step * start >= 0, decay, 1.0).to(start)
    weight.copy_(decay * start - lr * step)
    back = _brake(weight, start, o["radial_brake"]) if "radial_brake" in o else 1.0
    return Stages(m, step / scale, scale, back * lr * scale, back * decay)


def plain_scale(scale: str, out: int, fan_in: int) -> float:
    """The factor of the option `scale`."""
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)),
        "spectral": math.sqrt(max(1.0, out / fan_in)),
        "unit_rms": math.sqrt(out / fan_in),
        "none": 1.0,
    }[scale]


def _with_parts(orthogonalize: Orthogonalize, o: Mapping[str, Any]) -> Orthogonalize:
    def ns(u: Tensor) -> Tensor:
        if o.get("muoneq"):
            norms = u.norm(dim=1, keepdim=True)
            u = torch.where(norms > 0, u / norms, 0.0)
        x = orthogonalize(u)
        if o.get("muon_plus") and x.norm() > 0:
            x = x * math.sqrt(min(x.shape)) / x.norm()
        return x

    return ns


def _brake(weight: Tensor, start: Tensor, brake: float) -> float:
    """Undo a part of the growth of the norm, in place; return the factor."""
    was, now = float(start.norm()), float(weight.norm())
    if now <= was:
        return 1.0
    weight.mul_((was + brake * (now - was)) / now)
    return (was + brake * (now - was)) / now


def _row_floor(step: Tensor, weight: Tensor, floor: float) -> Tensor:
    norms, wanted = step.norm(dim=1, keepdim=True), floor * weight.norm(dim=1, keepdim=True)
    return torch.where((norms > 0) & (norms < wanted), step * wanted / norms, step)


def _normuon(x: Tensor, memory: Memory, o: Mapping[str, Any]) -> Tensor:
    v = o["beta2"] * memory.get("row_second_moment", 0.0) + (1 - o["beta2"]) * (x * x).mean(dim=1, keepdim=True)
    memory["row_second_moment"] = v
    n = x / (v.sqrt() + o["eps"])
    return n * x.norm() / (n.norm() + o["eps"])


def _adamuon(x: Tensor, memory: Memory, o: Mapping[str, Any]) -> Tensor:
    v = o["beta2"] * memory.get("update_second_moment", 0.0) + (1 - o["beta2"]) * x * x
    memory["update_second_moment"] = v
    n = x / (v.sqrt() + o["eps"])
    return math.sqrt(min(x.shape)) * n / (n.norm() + o["eps"])


def _namo(gradient: Tensor, m: Tensor, mu1: float, memory: Memory, o: Mapping[str, Any]) -> float:
    t = memory["gradient_steps"] = memory.get("gradient_steps", 0) + 1
    v = o["mu2"] * memory.get("gradient_second_moment", 0.0) + (1 - o["mu2"]) * float(gradient.norm()) ** 2
    memory["gradient_second_moment"] = v
    return math.sqrt(1 - o["mu2"] ** t) / (1 - mu1**t) * float(m.norm()) / (math.sqrt(v) + o["eps"])


def _hyperball(weight: Tensor, u: Tensor, lr: float, rest: float, memory: Memory) -> tuple[Tensor, float]:
    """The direction, to be multiplied by `lr`, and the factor that restores the weight's norm."""
    radius = memory.setdefault("radius", weight.norm().clone()).to(weight.dtype)
    if not u.norm() > 0:
        return torch.zeros_like(u), 1.0
    direction = rest * radius * u / u.norm()
    moved = weight - lr * direction
    back = float(radius / moved.norm())
    weight.copy_(back * moved)
    return direction, back


def _soap(
    u: Tensor, gradient: Tensor, memory: Memory, o: Mapping[str, Any], rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """The preconditioned look-ahead, and the basis of the next step.

    Covariances and bases are fp32, as in the state: the eigenvectors of a singular covariance depend on its last bit,
    so a result in another dtype could not be compared.
    """
    beta2, steps = o["beta2"], memory.get("basis_steps", 0)
    x = u
    if steps:
        left, right = memory["row_basis"].to(u), memory["column_basis"].to(u)
        p = rounded(left.T @ u @ right)
        v = beta2 * memory.get("projected_second_moment", 0.0) + (1 - beta2) * p * p
        memory["projected_second_moment"] = v
        x = left @ (p / (v.sqrt() + 1e-8)) @ right.T
        x = x * u.norm() / max(float(x.norm()), 1e-8)
    elif not gradient.any():
        return x
    g = gradient.float()
    for name, basis, outer in (
        ("row_covariance", "row_basis", rounded(g @ g.T)),
        ("column_covariance", "column_basis", rounded(g.T @ g)),
    ):  # fmt: skip
        covariance = memory.setdefault(name, torch.zeros_like(outer))
        covariance.lerp_(outer, 1 - beta2)
        if not steps:
            memory[basis] = torch.linalg.eigh(covariance.double())[1].flip(1).float()
        elif steps % o["frequency"] == 0:
            _turn_basis(memory, covariance, basis, rows=basis == "row_basis")
    memory["basis_steps"] = steps + 1
    return x


def _turn_basis(memory: Memory, covariance: Tensor, basis: str, rows: bool) -> None:
    q, v = memory[basis], memory["projected_second_moment"]
    order = torch.einsum("ij,ij->j", q, covariance @ q).argsort(descending=True)
    memory["projected_second_moment"] = v[order] if rows else v[:, order]
    memory[basis] = torch.linalg.qr((covariance @ q[:, order]).double())[0].float()
