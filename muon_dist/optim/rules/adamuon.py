"""AdaMuon: Adam's second moment on orthogonalized updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from muon_dist.optim.rules.factors import stack_norms
from muon_dist.optim.rules.muon import Group, MuonRule, Owned, Size

SECOND_MOMENT = "update_second_moment"


class AdaMuonRule(MuonRule):
    """The orthogonalized sign of the momentum, divided element by element by a second moment (arXiv 2507.11005v3,
    algorithm 1).

        O = newton_schulz(sign(U));  V <- lerp(V, O^2, 1 - beta2);  N = O / (sqrt(V) + eps)
        update = sqrt(min(rows, cols)) N / (||N|| + eps)

    V starts at zero and has no bias correction. The sign of zero is zero. With the default scale `match_rms_adamw` the
    update is the paper's, 0.2 sqrt(rows cols) N / ||N||. The first version of the paper, and the authors' adamuon.py,
    have no sign, but beta2 0.999 and a bias correction.
    """

    name: ClassVar[str] = "adamuon"
    # Both values are the paper's (v3): the second moment uses the beta of the momentum, 0.95; eps is 1e-8.
    options: ClassVar[Mapping[str, float]] = {"beta2": 0.95, "eps": 1e-8}
    elsewhere: ClassVar[Mapping[str, str]] = {"beta1": "momentum"}
    owner_memory: ClassVar[Mapping[str, Size]] = {SECOND_MOMENT: lambda matrix: matrix.numel}

    def problem(self, group: Group) -> str | None:
        beta2, eps = group["rule_options"]["beta2"], group["rule_options"]["eps"]
        if not 0 <= beta2 < 1:
            return f"beta2 is {beta2}: it must be in [0, 1)"
        return None if eps > 0 else f"eps is {eps}: it must be above 0, since an element may be zero"

    def direction(self, owned: Owned, group: Group) -> None:
        stack, moments = owned.stack, [v.view_as(owned.stack[0]) for v in owned.memory[SECOND_MOMENT]]
        beta2, eps = group["rule_options"]["beta2"], group["rule_options"]["eps"]
        owned.orthogonalize(stack.sign_())
        for update, moment in zip(stack, moments, strict=True):
            moment.lerp_(update.square(), 1 - beta2)
            update.div_(moment.sqrt().add_(eps))
        stack.mul_(math.sqrt(min(stack.shape[-2:])) / stack_norms(stack).add_(eps))
