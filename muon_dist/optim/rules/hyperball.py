"""Hyperball (MuonH): every weight keeps its initial Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.optim.rules.factors import stack_norms
from muon_dist.optim.rules.muon import WEIGHT, Group, MuonRule, Owned

RADIUS = "radius"
# fp32 rounds each element by a relative 6e-8. A norm this close to the radius is not corrected.
_ROUNDING = 1e-7


class HyperballRule(MuonRule):
    """Steps of length lr R on the sphere of radius R = ||W_0|| (arXiv 2606.16899).

        u = newton_schulz(U);  W' = W - lr R u / ||u||;  W <- R W' / ||W'||

    The rule has neither scale nor decay. R is the norm of the weight before the first step.
    """

    name: ClassVar[str] = "hyperball"
    scale: ClassVar[str] = "none"
    defaults: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.0}
    refused: ClassVar[Mapping[str, str]] = {
        "scale": "the length of its step is lr times the norm of the weight",
        "weight_decay": "it keeps the norm of the weight, so nothing can decay",
        "cautious": "it has no weight decay",
        "radial_brake": "it keeps the norm of the weight already",
        "row_floor": "the length of its step is fixed: lr times the norm of the weight",
    }
    matrix_memory: ClassVar[tuple[str, ...]] = (RADIUS,)
    norms_first: ClassVar[tuple[str, ...]] = (WEIGHT,)
    norms_after: ClassVar[tuple[str, ...]] = (WEIGHT,)

    def start(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], names: Sequence[str]) -> None:
        radius = memory[RADIUS]
        radius.copy_(torch.where(radius > 0, radius, norms[WEIGHT]))
        zero = (radius == 0).nonzero().flatten().tolist()
        if zero:
            raise ConfigError(
                f"{names[zero[0]]} is zero (and {len(zero) - 1} more matrices): under the rule 'hyperball' a weight "
                "keeps its norm, so it would stay zero forever. Initialize it to other values, or give it rule 'muon'"
            )

    def begin(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group) -> Tensor | None:
        return memory[RADIUS]

    def direction(self, owned: Owned, group: Group) -> None:
        assert owned.factors is not None
        owned.orthogonalize(owned.stack)
        length = stack_norms(owned.stack)
        # Zero momentum has no direction: the weight does not change.
        share = torch.where(length > 0, owned.factors.view(-1, 1, 1) / length, 0.0)
        owned.stack.mul_(share.to(owned.stack.dtype))

    def end(
        self, norms: Mapping[str, Tensor], before: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group
    ) -> Tensor | None:
        factor = memory[RADIUS] / norms[WEIGHT]
        return torch.where((factor - 1).abs() > _ROUNDING, factor, 1.0)
