"""Weights stepped by `muon_dist.optim.plain`: one process, whole tensors, fp64, one matrix after another."""

from __future__ import annotations

from typing import Any

import torch

from muon_dist.layout import cut_parameter
from muon_dist.optim.plain import plain_step

Tensors = dict[str, torch.Tensor]


class PlainRule:
    """Weights that are stepped by one rule.

    Args:
        weights: by name.
        cuts: by name, arguments of `cut_parameter`.
        rule, options: as in a parameter group; `rule_options` stand among the options.
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
        **options: Any,
    ) -> None:
        self.weights = {n: w.detach().to(torch.float64).clone() for n, w in weights.items()}
        self.matrices = {n: cut_parameter(n, tuple(w.shape), **(cuts.get(n) or {})) for n, w in weights.items()}
        self.rule, self.lr, self.weight_decay, self.momentum, self.options = rule, lr, weight_decay, momentum, options
        if scale is not None:
            self.options["scale"] = scale
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
                plain_step(
                    weight, g, self.memory.setdefault(m.name, {}), self.rule,
                    lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum, **self.options,
                )  # fmt: skip
