"""Parts: small changes of a rule; a part combines with every rule that allows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.optim.rules.factors import stack_norms
from muon_dist.optim.rules.muon import GRADIENT, MOMENTUM, WEIGHT, Group, HeldWeights, MuonRule, Owned, Size
from muon_dist.optim.rules.scale import update_scale

# fp32 rounds each element by a relative 6e-8. A norm this close to the wanted one is not corrected.
_ROUNDING = 1e-7
OWNER_MOMENTUM = "owner_momentum"


class Part(MuonRule):
    """Base class of parts. A part is a base class before the rule's class: `super()` is the next part, or the rule.

    A part reads its value as `group["rule_options"][ItsClass.option]`: `self.option` is the option of the first part.

    Attributes:
        option: name of the part in `rule_options`.
        switch: True: the value is True or False. False: it is a number.
    """

    option: ClassVar[str]
    switch: ClassVar[bool] = True

    @staticmethod
    def wrong(value: float) -> str | None:
        """Text of the error about an invalid value; None if it is valid."""
        return None

    @staticmethod
    def misfit(rule: MuonRule) -> str | None:
        """The reason why a rule cannot have this part; None if it can."""
        return None


class _Late(Part):
    """Base class of parts that decay and update together, so that both use the weight before the step."""

    decays_late: ClassVar[bool] = True

    def decay(self, held: HeldWeights, group: Group) -> None:
        if held.updates is not None:
            super().decay(held, group)


class Cautious(_Late):
    """Cautious weight decay: no decay where update and weight have opposite signs (arXiv 2510.12402, algorithm 1).

    W <- W - lr weight_decay W [u W >= 0];  W <- W - lr u
    """

    option: ClassVar[str] = "cautious"

    def decay(self, held: HeldWeights, group: Group) -> None:
        if held.updates is None or not group["weight_decay"]:
            return
        before = [w.clone() for w in held.weights] if group["rule_options"][Cautious.option] else []
        super().decay(held, group)
        for weight, was, update in zip(held.weights, before, held.updates, strict=bool(before)):
            # Multiply signs, because the product of two small numbers may underflow to zero.
            weight.copy_(torch.where(was.sign() * update.sign() < 0, was, weight))


class RowFloor(_Late):
    """A lower bound on each output feature's update, relative to its weights (modded-nanogpt, track 3, #46).

        u_i <- u_i max(1, row_floor ||w_i|| / ||u_i||)

    u is the update times its `scale`, before the learning rate. The record uses 0.3825, and scale `spectral`. A
    feature whose update is zero does not change. The record also keeps the norm of the weight; see `hyperball`.
    """

    option: ClassVar[str] = "row_floor"
    switch: ClassVar[bool] = False
    feature_norms: ClassVar[bool] = True

    @staticmethod
    def wrong(value: float) -> str | None:
        return None if value >= 0 else "it must be at least 0"

    def direction(self, owned: Owned, group: Group) -> None:
        super().direction(owned, group)
        inputs = -2 if owned.matrices[0].transposed else -1
        floor = group["rule_options"][RowFloor.option] / update_scale(group["scale"], owned.matrices[0])
        assert owned.feature_norms is not None
        wanted = owned.feature_norms.unsqueeze(inputs).to(owned.stack.dtype).mul_(floor)
        found = torch.linalg.vector_norm(owned.stack, dim=inputs, keepdim=True)
        owned.stack.mul_(torch.where(found > 0, wanted / found, 1.0).clamp_min_(1.0))


class RadialBrake(Part):
    """Reduces the growth of a weight's norm in each step to the share `radial_brake`.

    W1 = W after the step;  if ||W1|| > ||W||: W <- W1 (||W|| + radial_brake (||W1|| - ||W||)) / ||W1||

    Sources: modded-nanogpt, track 3, #29; `RadialBrakeHook` of NVIDIA's Emerging-Optimizers with inward_scale 1. Both
    use 0.5. 1 changes nothing.
    """

    option: ClassVar[str] = "radial_brake"
    switch: ClassVar[bool] = False
    norms_before: ClassVar[tuple[str, ...]] = (WEIGHT,)
    norms_after: ClassVar[tuple[str, ...]] = (WEIGHT,)

    @staticmethod
    def wrong(value: float) -> str | None:
        return None if 0 <= value <= 1 else "it must be in [0, 1]"

    def end(
        self, norms: Mapping[str, Tensor], before: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group
    ) -> Tensor | None:
        was, now = before[WEIGHT], norms[WEIGHT]
        factor = (was + group["rule_options"][RadialBrake.option] * (now - was)) / now
        factor = torch.where((now > was) & ((factor - 1).abs() > _ROUNDING), factor, 1.0)
        others = super().end(norms, before, memory, group)
        return factor if others is None else factor * others


class MuonEq(Part):
    """MuonEq-R: all output features get equal norms before Newton-Schulz (arXiv 2603.28254).

    Zero features stay zero. The common norm is arbitrary, because Newton-Schulz normalizes its input.
    """

    option: ClassVar[str] = "muoneq"

    def direction(self, owned: Owned, group: Group) -> None:
        if group["rule_options"][MuonEq.option]:
            inputs = -2 if owned.matrices[0].transposed else -1
            owned.orthogonalize = partial(_equalized, owned.orthogonalize, inputs)
        super().direction(owned, group)


def _equalized(orthogonalize: Callable[[Tensor], None], inputs: int, stack: Tensor) -> None:
    largest = stack.abs().amax(dim=(-2, -1), keepdim=True)
    stack.div_(torch.where(largest > 0, largest, 1.0))  # so that no square underflows below
    norms = torch.linalg.vector_norm(stack, dim=inputs, keepdim=True)
    stack.div_(torch.where(norms > 0, norms, 1.0))
    orthogonalize(stack)


class MuonPlus(Part):
    """Muon+: scales the orthogonalized matrix to the norm of a matrix with orthonormal rows or columns (arXiv
    2602.21545, as in nanochat).

        O <- O sqrt(min(rows, cols)) / ||O||
    """

    option: ClassVar[str] = "muon_plus"

    def direction(self, owned: Owned, group: Group) -> None:
        if group["rule_options"][MuonPlus.option]:
            owned.orthogonalize = partial(_renormed, owned.orthogonalize)
        super().direction(owned, group)


def _renormed(orthogonalize: Callable[[Tensor], None], stack: Tensor) -> None:
    orthogonalize(stack)
    norms = stack_norms(stack)
    stack.mul_(torch.where(norms > 0, math.sqrt(min(stack.shape[-2:])) / norms, 1.0))


class MomentumAtOwner(Part):
    """The sources send gradients, and the owner of a matrix keeps its momentum, in fp32.

    The result equals Muon's. 16-bit gradients are sent in 16 bits without loss; momentum would have to be sent in
    fp32, or rounded (docs/performance.md). A rule that also needs the gradients reads them from the same message.
    """

    option: ClassVar[str] = "momentum_at_owner"
    momentum_at_owner: ClassVar[bool] = True
    owner_memory: ClassVar[Mapping[str, Size]] = {OWNER_MOMENTUM: lambda matrix: matrix.numel}

    @staticmethod
    def misfit(rule: MuonRule) -> str | None:
        if MOMENTUM in (*rule.norms_first, *rule.norms_before, *rule.norms_after):
            return "it needs norms of the momentum, so the sources must keep the momentum"
        own = type(rule).send is not MuonRule.send or type(rule).remember is not MuonRule.remember
        return "it computes its momentum in another way" if own else None

    def send(self, out: list[Tensor], momentum: list[Tensor], group: Group) -> None:
        """Do nothing: `out` already holds the gradients."""

    def receive(self, owned: Owned, group: Group) -> None:
        if not group["rule_options"][MomentumAtOwner.option]:
            raise ConfigError("momentum_at_owner was switched off after the first step: make a new optimizer")
        updates, beta = list(owned.stack), group["momentum"]
        kept = [m.view_as(updates[0]) for m in owned.memory[OWNER_MOMENTUM]]
        if self.gradient_stays:
            owned.sent = {**owned.sent, GRADIENT: owned.stack.clone()}
        torch._foreach_lerp_(kept, updates, 1 - beta)
        if group["nesterov"]:
            torch._foreach_lerp_(updates, kept, beta)
        else:
            torch._foreach_copy_(updates, kept)


PARTS: Mapping[str, type[Part]] = {
    part.option: part for part in (Cautious, RowFloor, RadialBrake, MuonEq, MuonPlus, MomentumAtOwner)
}
"""Parts by option name, in the order of the base classes before the rule's class."""


@functools.lru_cache(maxsize=256)
def with_parts(rule: MuonRule, parts: tuple[str, ...]) -> MuonRule:
    """The rule with the parts named by their options. Equal arguments return the same object."""
    chosen = tuple(part for option, part in PARTS.items() if option in parts)
    if not chosen:
        return rule
    of_all: dict[str, Any] = {
        # Join the lists, because a class attribute hides that of the next class.
        name: tuple(dict.fromkeys(wanted for part in (*chosen, rule) for wanted in getattr(part, name)))
        for name in ("sends", "norms_first", "norms_before", "norms_after")
    }
    of_all["owner_memory"] = {**rule.owner_memory}
    for part in chosen:
        of_all["owner_memory"] |= part.owner_memory
    if MomentumAtOwner in chosen and GRADIENT in of_all["sends"]:  # the message already holds the gradient
        of_all["sends"] = tuple(name for name in of_all["sends"] if name != GRADIENT)
        of_all["gradient_stays"] = True
    made = type(" ".join((*parts, rule.name)), (*chosen, type(rule)), of_all)
    return cast(MuonRule, made())
