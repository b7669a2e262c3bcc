"""NAMO: the orthogonalized update with one adaptive step size per matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from muon_dist.optim.rules.factors import scale_weights
from muon_dist.optim.rules.muon import GRADIENT, MOMENTUM, Group, HeldWeights, MuonRule, Owned

SECOND_MOMENT, STEPS = "gradient_second_moment", "gradient_steps"


class NamoRule(MuonRule):
    """Muon with Adam's adaptive step size, computed from norms of whole matrices (arXiv 2602.17080, algorithm 1).

        M <- mu1 M + (1 - mu1) G;  v <- mu2 v + (1 - mu2) ||G||^2
        alpha = sqrt(1 - mu2^t) / (1 - mu1^t) ||M|| / (sqrt(v) + eps)
        W <- W - lr alpha (newton_schulz(M) + weight_decay W)

    mu1 is the option `momentum`. G is the gradient itself, so there is no Nesterov look-ahead.
    """

    name: ClassVar[str] = "namo"
    # mu2 and eps: section 5 of the paper.
    options: ClassVar[Mapping[str, float]] = {"mu2": 0.99, "eps": 1e-8}
    scale: ClassVar[str] = "none"
    defaults: ClassVar[Mapping[str, Any]] = {"nesterov": False}
    refused: ClassVar[Mapping[str, str]] = {"nesterov": "it orthogonalizes the momentum itself"}
    elsewhere: ClassVar[Mapping[str, str]] = {"mu1": "momentum", "lambda": "weight_decay"}
    shrinks_with_momentum: ClassVar[bool] = True
    matrix_memory: ClassVar[tuple[str, ...]] = (SECOND_MOMENT, STEPS)
    norms_before: ClassVar[tuple[str, ...]] = (GRADIENT, MOMENTUM)

    def problem(self, group: Group) -> str | None:
        mu2, eps = group["rule_options"]["mu2"], group["rule_options"]["eps"]
        if not 0 <= mu2 < 1:
            return f"mu2 is {mu2}: it must be in [0, 1)"
        return None if eps > 0 else f"eps is {eps}: it must be above 0, since a gradient may be zero"

    def begin(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group) -> Tensor | None:
        mu1, mu2, eps = group["momentum"], group["rule_options"]["mu2"], group["rule_options"]["eps"]
        moment, steps = memory[SECOND_MOMENT], memory[STEPS]
        steps.add_(1)
        moment.lerp_(norms[GRADIENT].square(), 1 - mu2)
        correction = (1 - mu2**steps).sqrt() / (1 - mu1**steps)
        return correction * norms[MOMENTUM] / (moment.sqrt() + eps)

    def decay(self, held: HeldWeights, group: Group) -> None:
        if group["weight_decay"]:
            assert held.factors is not None
            scale_weights(held.weights, held.positions, 1 - held.lr * group["weight_decay"] * held.factors)

    def direction(self, owned: Owned, group: Group) -> None:
        assert owned.factors is not None
        owned.orthogonalize(owned.stack)
        owned.stack.mul_(owned.factors.view(-1, 1, 1).to(owned.stack.dtype))
