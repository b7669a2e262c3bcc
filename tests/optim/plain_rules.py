"""The update rules as their papers write them: one process, whole tensors, fp64, one matrix after another.

Nothing here is shared with `muon_dist.optim.rules`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from muon_dist.layout import Matrix, cut_parameter
from muon_dist.optim.reference import plain_newton_schulz

Tensors = dict[str, torch.Tensor]
DEFAULT_SCALE = {"muon": "match_rms_adamw", "normuon": "match_rms_adamw", "hyperball": "none", "namo": "none"}


class PlainRule:
    """Weights that are stepped by one rule.

    Args:
        weights: by name.
        cuts: by name, arguments of `cut_parameter`.
        rule, options: as in a parameter group.
    """

    def __init__(
        self,
        weights: Tensors,
        cuts: dict[str, dict[str, Any]],
        rule: str,
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        scale: str | None = None,
        **options: float,
    ) -> None:
        self.weights = {n: w.detach().to(torch.float64).clone() for n, w in weights.items()}
        self.matrices = {n: cut_parameter(n, tuple(w.shape), **(cuts.get(n) or {})) for n, w in weights.items()}
        self.rule, self.lr, self.weight_decay, self.momentum, self.options = rule, lr, weight_decay, momentum, options
        self.scale = scale or DEFAULT_SCALE[rule]
        self.memory: dict[str, dict[str, Any]] = {}

    def step(self, gradients: Tensors) -> None:
        for name, gradient in gradients.items():
            for m in self.matrices[name]:
                weight, g = (
                    t.reshape(-1).as_strided((m.rows, m.cols), (m.block.stride, 1), m.block.start)
                    for t in (self.weights[name], gradient.to(torch.float64))
                )
                if m.transposed:  # (out, in), as in the papers
                    weight, g = weight.mT, g.mT
                kept = self.memory.setdefault(m.name, {"momentum": torch.zeros_like(g)})
                kept["momentum"] = self.momentum * kept["momentum"] + (1 - self.momentum) * g
                getattr(self, f"_{self.rule}")(weight, g, kept, m)

    def _factor(self, m: Matrix) -> float:
        out, fan_in = m.fan
        return {"match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)), "none": 1.0}[self.scale]

    def _look_ahead(self, g: torch.Tensor, kept: dict[str, Any]) -> torch.Tensor:
        return (1 - self.momentum) * g + self.momentum * kept["momentum"]

    def _muon(self, weight: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], m: Matrix) -> None:
        o = plain_newton_schulz(self._look_ahead(g, kept))
        weight.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * self._factor(m) * o)

    def _normuon(self, weight: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], m: Matrix) -> None:
        beta2, eps = self.options.get("beta2", 0.95), self.options.get("eps", 1e-10)
        o = plain_newton_schulz(self._look_ahead(g, kept))
        v = kept["v"] = beta2 * kept.get("v", 0.0) + (1 - beta2) * (o * o).mean(dim=1, keepdim=True)
        n = o / (v.sqrt() + eps)
        n = n * o.norm() / (n.norm() + eps)
        weight.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * self._factor(m) * n)

    def _hyperball(self, weight: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], m: Matrix) -> None:
        radius = kept.setdefault("radius", weight.norm().clone())
        u = plain_newton_schulz(self._look_ahead(g, kept))
        if u.norm() > 0:
            moved = weight - self.lr * radius * u / u.norm()
            weight.copy_(radius * moved / moved.norm())

    def _namo(self, weight: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], m: Matrix) -> None:
        mu1, mu2, eps = self.momentum, self.options.get("mu2", 0.99), self.options.get("eps", 1e-8)
        t = kept["t"] = kept.get("t", 0) + 1
        v = kept["v"] = mu2 * kept.get("v", 0.0) + (1 - mu2) * float(g.norm()) ** 2
        alpha = math.sqrt(1 - mu2**t) / (1 - mu1**t) * float(kept["momentum"].norm()) / (math.sqrt(v) + eps)
        o = plain_newton_schulz(kept["momentum"])
        weight.sub_(self.lr * alpha * (self._factor(m) * o + self.weight_decay * weight))
