"""NorMuon: the orthogonalized update, normalized per output feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from muon_dist.optim.rules.factors import stack_norms
from muon_dist.optim.rules.muon import Group, MuonRule, Owned, Size

SECOND_MOMENT = "row_second_moment"


class NorMuonRule(MuonRule):
    """The orthogonalized update, divided by a second moment of each output feature (arXiv 2510.05491, algorithm 1).

        O = newton_schulz(U);  v_i <- lerp(v_i, mean_j O_ij^2, 1 - beta2)
        N_ij = O_ij / (sqrt(v_i) + eps);  update = N ||O|| / (||N|| + eps)

    v starts at zero and has no bias correction, as in the authors' normuon.py. The update has the norm of O, so
    `scale` has the same meaning as for Muon. The paper's factor 0.2 sqrt(rows cols) / ||N|| equals `match_rms_adamw`
    for a matrix with orthonormal rows or columns. If a weight is stored (in, out), its output features are its
    columns.
    """

    name: ClassVar[str] = "normuon"
    # beta2: section 4.1 of the paper, and the default of normuon.py. eps: the constant in normuon.py.
    options: ClassVar[Mapping[str, float]] = {"beta2": 0.95, "eps": 1e-10}
    elsewhere: ClassVar[Mapping[str, str]] = {"beta1": "momentum"}
    owner_memory: ClassVar[Mapping[str, Size]] = {SECOND_MOMENT: lambda matrix: matrix.fan[0]}

    def problem(self, group: Group) -> str | None:
        beta2, eps = group["rule_options"]["beta2"], group["rule_options"]["eps"]
        if not 0 <= beta2 < 1:
            return f"beta2 is {beta2}: it must be in [0, 1)"
        return None if eps > 0 else f"eps is {eps}: it must be above 0, since an output feature may be zero"

    def direction(self, owned: Owned, group: Group) -> None:
        stack, moments = owned.stack, owned.memory[SECOND_MOMENT]
        beta2, eps = group["rule_options"]["beta2"], group["rule_options"]["eps"]
        inputs = -2 if owned.matrices[0].transposed else -1
        owned.orthogonalize(stack)
        before = stack_norms(stack)
        squares = torch.linalg.vector_norm(stack, dim=inputs).square_().div_(stack.size(inputs))
        torch._foreach_lerp_(moments, list(squares.unbind()), 1 - beta2)
        stack.div_(torch.stack(moments).sqrt_().add_(eps).unsqueeze(inputs))
        stack.mul_(before.div_(stack_norms(stack).add_(eps)))
