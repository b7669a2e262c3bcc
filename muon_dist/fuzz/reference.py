"""What a case must come to: the papers' formulas in fp64, in one process, on whole tensors.

Nothing here is shared with the optimizer but the plain Newton-Schulz iteration of `optim.reference`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from muon_dist.fuzz.case import ADAMW, ADAMW_OPTIONS, MUON, SECOND_GROUP, ZERO, Case, Parameter
from muon_dist.fuzz.model import Tensors, sample, start
from muon_dist.optim.reference import plain_newton_schulz

DEFAULT_SCALE = {"muon": "match_rms_adamw", "normuon": "match_rms_adamw", "hyperball": "none", "namo": "none"}


class Reference:
    """The weights of a case, stepped plainly.

    Attributes:
        weights: by FQN, in fp64.
        orthogonalized: matrices that a step has to orthogonalize, over all steps so far.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weights: Tensors = {n: w.double() for n, w in start(case).items()}
        self.memory: dict[tuple[str, int], dict[str, Any]] = {}
        self.orthogonalized = 0

    def step(self, step: int) -> None:
        gradients = self._gradients(step)
        clipped = self._clipped(gradients)
        for p in self.case.parameters:
            if p.fqn not in gradients:
                continue
            if p.kind == ADAMW:
                self._adamw(p, clipped[p.fqn], self.case.rate(step))
            elif p.kind == MUON:
                spared = self.case.setup_of(step).framework == ZERO and not self.case.clip_muon
                self._matrices(p, (gradients if spared else clipped)[p.fqn], self.case.rate(step))

    def _gradients(self, step: int) -> Tensors:
        """The mean over all samples; a parameter that is used under two names gets it twice."""
        count = self.case.setup_of(step).data * self.case.accumulation
        total: Tensors = {}
        for number in range(count):
            for name, given in sample(self.case, step, number).items():
                total[name] = total.get(name, 0.0) + given.double() / count
        return {p.fqn: total[p.fqn] * (2 if p.tied else 1) for p in self.case.parameters if p.fqn in total}

    def _clipped(self, gradients: Tensors) -> Tensors:
        if self.case.clip is None:
            return gradients
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        factor = min(1.0, self.case.clip / (norm + 1e-6))
        return {name: g * factor for name, g in gradients.items()}

    def _adamw(self, p: Parameter, g: torch.Tensor, lr: float) -> None:
        kept: dict[str, Any] = self.memory.setdefault(
            (p.name, -1), {"t": 0, "m": torch.zeros_like(g), "v": torch.zeros_like(g)}
        )
        (beta1, beta2), w = ADAMW_OPTIONS["betas"], self.weights[p.fqn]
        kept["t"] += 1
        kept["m"] = beta1 * kept["m"] + (1 - beta1) * g
        kept["v"] = beta2 * kept["v"] + (1 - beta2) * g * g
        m = kept["m"] / (1 - beta1 ** kept["t"])
        v = kept["v"] / (1 - beta2 ** kept["t"])
        w.mul_(1 - lr * ADAMW_OPTIONS["weight_decay"])
        w.sub_(lr * m / (v.sqrt() + ADAMW_OPTIONS["eps"]))

    def _matrices(self, p: Parameter, gradient: torch.Tensor, lr: float) -> None:
        case, rule = self.case, self.case.rule
        options: dict[str, Any] = {
            "lr": lr, "weight_decay": case.weight_decay, "momentum": case.momentum, "scale": case.scale,
            "nesterov": case.nesterov,
        }  # fmt: skip
        if p.group == 1:
            rule, options = "muon", {**options, **SECOND_GROUP, "lr": 0.5 * lr}
        if options["nesterov"] is None:
            options["nesterov"] = rule != "namo"
        options["scale"] = options["scale"] or DEFAULT_SCALE[rule]
        pairs = zip(p.matrices(self.weights[p.fqn]), p.matrices(gradient), strict=True)
        for i, (w, g) in enumerate(pairs):
            kept = self.memory.setdefault((p.name, i), {"rest": 0, "moved": False})
            if p.transposed:  # (out, in), as in the papers
                w, g = w.mT, g.mT
            zero = not bool(g.any())
            kept["moved"] |= not zero
            kept["rest"] = kept["rest"] + 1 if zero and kept["moved"] else 0
            kept["m"] = options["momentum"] * kept.get("m", 0.0) + (1 - options["momentum"]) * g
            getattr(self, f"_{rule}")(w, g, kept, options)
            self.orthogonalized += 1

    def _orthogonal(self, g: torch.Tensor, kept: dict[str, Any], o: dict[str, Any]) -> torch.Tensor:
        mu = o["momentum"]
        return plain_newton_schulz((1 - mu) * g + mu * kept["m"] if o["nesterov"] else kept["m"], self.case.ns_steps)

    @staticmethod
    def _factor(w: torch.Tensor, o: dict[str, Any]) -> float:
        out, fan_in = w.shape
        factors = {
            "match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)),
            "spectral": math.sqrt(max(1.0, out / fan_in)),
            "none": 1.0,
        }
        return factors[o["scale"]]

    def _muon(self, w: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], o: dict[str, Any]) -> None:
        update = self._orthogonal(g, kept, o) * o["momentum"] ** kept["rest"]
        w.mul_(1 - o["lr"] * o["weight_decay"]).sub_(o["lr"] * self._factor(w, o) * update)

    def _normuon(self, w: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], o: dict[str, Any]) -> None:
        x = self._orthogonal(g, kept, o)
        kept["v"] = 0.95 * kept.get("v", 0.0) + 0.05 * (x * x).mean(dim=1, keepdim=True)
        n = x / (kept["v"].sqrt() + 1e-10)
        n = n * x.norm() / (n.norm() + 1e-10) * o["momentum"] ** kept["rest"]
        w.mul_(1 - o["lr"] * o["weight_decay"]).sub_(o["lr"] * self._factor(w, o) * n)

    def _hyperball(self, w: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], o: dict[str, Any]) -> None:
        radius = kept.setdefault("radius", w.norm().clone())
        u = self._orthogonal(g, kept, o)
        if u.norm() > 0:
            moved = w - o["lr"] * radius * o["momentum"] ** kept["rest"] * u / u.norm()
            w.copy_(radius * moved / moved.norm())

    def _namo(self, w: torch.Tensor, g: torch.Tensor, kept: dict[str, Any], o: dict[str, Any]) -> None:
        t = kept["t"] = kept.get("t", 0) + 1
        v = kept["v"] = 0.99 * kept.get("v", 0.0) + 0.01 * float(g.norm()) ** 2
        alpha = math.sqrt(1 - 0.99**t) / (1 - o["momentum"] ** t) * float(kept["m"].norm()) / (math.sqrt(v) + 1e-8)
        update = self._factor(w, o) * self._orthogonal(g, kept, o)
        w.sub_(o["lr"] * alpha * (update + o["weight_decay"] * w))
