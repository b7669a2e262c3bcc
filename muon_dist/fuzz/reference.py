"""The right result of a case: the papers' formulas in fp64, in one process, on whole tensors.

The formulas of rules and parts are those of `optim.plain`; nothing here is shared with the optimizer itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from muon_dist.fuzz.case import ADAMW, ADAMW_OPTIONS, MUON, ZERO, Case, Parameter, second_group
from muon_dist.fuzz.model import Tensors, sample, start
from muon_dist.optim.plain import plain_step
from muon_dist.optim.reference import plain_newton_schulz


class Reference:
    """The weights of a case, stepped by the plain algorithm.

    Args:
        noise: on the input of Newton-Schulz and on SOAP's products, relative to their norm. Two references, one with
            noise, show how much of the result rounding decides.
        seed: of the noise.

    Attributes:
        weights: by FQN, in fp64.
        orthogonalized: number of matrices that had to be orthogonalized in all steps so far.
    """

    def __init__(self, case: Case, noise: float = 0.0, seed: int = 0) -> None:
        self.case, self._noise, self._seed = case, noise, seed
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
            "lr": lr, "weight_decay": case.weight_decay, "momentum": case.momentum, **dict(case.rule_options),
            **{k: v for k, v in (("scale", case.scale), ("nesterov", case.nesterov)) if v is not None},
        }  # fmt: skip
        if p.group == 1:
            rule, options = "muon", {**second_group(case), "lr": 0.5 * lr}
        pairs = zip(p.matrices(self.weights[p.fqn]), p.matrices(gradient), strict=True)
        for i, (w, g) in enumerate(pairs):
            kept = self.memory.setdefault((p.name, i), {"rest": 0, "moved": False})
            if p.transposed:  # (out, in), as in the papers
                w, g = w.mT, g.mT
            zero = not bool(g.any())
            kept["moved"] |= not zero
            kept["rest"] = kept["rest"] + 1 if zero and kept["moved"] else 0
            rest = options["momentum"] ** kept["rest"]
            plain_step(
                w, g, kept, rule, rest=rest, orthogonalize=self._orthogonalize, rounded=self._rounded, **options
            )
            self.orthogonalized += 1

    def _orthogonalize(self, u: torch.Tensor) -> torch.Tensor:
        rows = self.case.ns_rows
        return plain_newton_schulz(self._rounded(u), len(rows) or self.case.ns_steps, rows or "keller")

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if not self._noise:
            return x
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self.orthogonalized)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + self._noise * x.norm() * noise / noise.norm()
