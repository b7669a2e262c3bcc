"""Muon's rule, and the base class of all other rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from muon_dist.layout import Matrix

Group = dict[str, Any]
"""A parameter group of torch.optim."""

GRADIENT, MOMENTUM, WEIGHT = "gradient", "momentum", "weight"
"""The tensors whose norms a rule may use, or which it may send to the owners (`sends`)."""

Size = Callable[[Matrix], int]
"""Returns the number of elements that a rule keeps for a matrix."""


@dataclass
class Owned:
    """Whole matrices of one shape and one parameter group, on their owner.

    Attributes:
        stack: (B, rows, cols) in fp32: the result of `send`; the rule overwrites it with the update.
        matrices: the B matrices; either all are stored (out, in), or all (in, out).
        orthogonalize: replaces a stack (B, rows, cols) by its orthogonalized update.
        memory: by name of `owner_memory`, one 1-D fp32 tensor per matrix; the rule changes it in place.
        sent: by name of `sends`, a tensor (B, rows, cols) in fp32.
        factors: (B,) in fp64: the result of `begin` for these matrices; None if it returned None.
        feature_norms: (B, outputs) in fp64, for a rule with `feature_norms`.
    """

    stack: Tensor
    matrices: Sequence[Matrix]
    orthogonalize: Callable[[Tensor], None]
    memory: Mapping[str, list[Tensor]] = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Tensor | None = None
    feature_norms: Tensor | None = None


@dataclass
class HeldWeights:
    """Weights of one parameter group that this rank holds, whole or in fragments.

    Attributes:
        weights: this rank's fragments; the rule changes them in place.
        positions: per weight, the index of its matrix in the group.
        factors: (matrices of the group,) in fp64: the result of `begin`; None if it returned None.
        lr: the learning rate of the group.
        updates: the tensors that `apply` will subtract, in the shapes of `weights`. Only in the second call of a rule
            that `decays_late`; else None.
    """

    weights: list[Tensor]
    positions: Sequence[int]
    factors: Tensor | None
    lr: float
    updates: Sequence[Tensor] | None = None


class MuonRule:
    """The rule of Keller Jordan (2024, https://kellerjordan.github.io/posts/muon/) and of `torch.optim.Muon`.

    With gradient G, momentum B and weight W:

        B <- lerp(B, G, 1 - momentum);  U <- lerp(G, B, momentum) if nesterov else B
        W <- W (1 - lr weight_decay) - lr scale(W) newton_schulz(U)

    A rule is one object without state. A step calls its methods in this order:

    1. `remember`: every rank updates the momentum that it holds.
    2. `begin`: every rank computes a factor for each matrix, from norms over all fragments of the matrix.
    3. `decay`: every rank decays the weights that it holds.
    4. `send`: every rank writes its messages to the owners.
    5. `receive`, only with `momentum_at_owner`: the owner computes momentum from the received gradients. Then
       `direction`: the owner replaces the whole matrix by its update.
    6. `apply`: every rank updates the weights that it holds.
    7. `end`: as `begin`, for a factor on the new weights.

    Attributes:
        name: value of the option `rule`.
        options: names of `rule_options`, and their defaults.
        scale: default of the option `scale`.
        defaults: other options whose default differs from Muon's.
        refused: options that the rule does not have, and why.
        elsewhere: the paper's names of options that are not in `rule_options`, and our names in the group.
        shrinks_with_momentum: the update shrinks with the momentum. If False, the step shrinks the update while the
            gradient of a matrix is exactly zero, because Newton-Schulz brings any momentum back to full size.
        owner_memory: names of the tensors that the owner of a matrix keeps, and their number of fp32 elements; zero
            at first.
        sends: tensors of the whole matrix that the owner gets besides the result of `send`: "gradient" (without an
            adapter's clip) or "weight" (before this step's decay if the rule `decays_late`). Each costs the bytes of
            another gather.
        decays_late: `decay` needs the update, so it is called a second time, with the update, right before `apply`.
        momentum_at_owner: the sources keep no momentum and send gradients; `receive` computes momentum on the owner.
        gradient_stays: `receive` leaves the gradient in `Owned.sent`, though no source sends it a second time.
        matrix_memory: names of the numbers that every rank keeps: one fp64 number per matrix.
        feature_norms: `direction` gets the norm of each output feature of the weight before the step, in
            `Owned.feature_norms`. Costs one small all-reduce.
        norms_first: tensors whose norms `start` gets.
        norms_before: tensors whose norms `begin` gets.
        norms_after: tensors whose norms `end` gets.
    """

    name: ClassVar[str] = "muon"
    options: ClassVar[Mapping[str, float]] = {}
    scale: ClassVar[str] = "match_rms_adamw"
    defaults: ClassVar[Mapping[str, Any]] = {}
    refused: ClassVar[Mapping[str, str]] = {}
    elsewhere: ClassVar[Mapping[str, str]] = {}
    shrinks_with_momentum: ClassVar[bool] = False
    owner_memory: ClassVar[Mapping[str, Size]] = {}
    sends: ClassVar[tuple[str, ...]] = ()
    decays_late: ClassVar[bool] = False
    momentum_at_owner: ClassVar[bool] = False
    gradient_stays: ClassVar[bool] = False
    matrix_memory: ClassVar[tuple[str, ...]] = ()
    feature_norms: ClassVar[bool] = False
    norms_first: ClassVar[tuple[str, ...]] = ()
    norms_before: ClassVar[tuple[str, ...]] = ()
    norms_after: ClassVar[tuple[str, ...]] = ()

    @property
    def looks_at_norms(self) -> bool:
        """Whether the rule uses `start`, `begin` or `end`."""
        return bool(self.matrix_memory or self.norms_before or self.norms_after)

    @property
    def sends_iteration(self) -> bool:
        """Whether the update is the result of Newton-Schulz itself, so that the iteration's dtype holds it exactly."""
        return type(self).direction is MuonRule.direction

    def problem(self, group: Group) -> str | None:
        """Text of a ConfigError about the values of `rule_options`; None if they are valid."""
        return None

    def remember(self, momentum: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        """Update fp32 momentum in place from fp32 gradients of the same shapes."""
        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])

    def start(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Prepare the memory of n matrices in their first step, or in the first step after a load.

        Args:
            norms: Frobenius norms of the matrices, (n,) in fp64, by name in `norms_first`.
            memory: (n,) in fp64, by name in `matrix_memory`; zero if nothing was loaded. Changed in place.
            names: names of the matrices, for messages.
        """

    def begin(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group) -> Tensor | None:
        """A factor for each of the n matrices, (n,) in fp64, equal on all ranks; None if the rule needs none.

        Args:
            norms: by name in `norms_before`, as in `start`.
            memory: as in `start`.
        """
        return None

    def decay(self, held: HeldWeights, group: Group) -> None:
        """Decay the weights in place."""
        factor = 1 - held.lr * group["weight_decay"]
        if factor == 1.0:
            return
        if any(w.device.type == "cpu" and w.dtype.itemsize < 4 for w in held.weights):
            # On a CPU torch._foreach_mul_ first rounds the factor to the tensor's dtype: 0.998 is 0.9961 in bfloat16.
            for w in held.weights:
                w.mul_(factor)
        else:
            torch._foreach_mul_(held.weights, factor)

    def send(self, out: list[Tensor], momentum: list[Tensor], group: Group) -> None:
        """Write the messages to the owners into `out`, in fp32.

        If the group has `nesterov`, or the rule `momentum_at_owner`, `out` holds the gradients before the call.
        """
        if group["nesterov"]:
            torch._foreach_lerp_(out, momentum, group["momentum"])
        else:
            torch._foreach_copy_(out, momentum)

    def receive(self, owned: Owned, group: Group) -> None:
        """Replace the gradients in `owned.stack` by the tensor to orthogonalize; only with `momentum_at_owner`."""

    def direction(self, owned: Owned, group: Group) -> None:
        """Replace `owned.stack` by the update, which `apply` multiplies by the learning rate and by `scale`."""
        owned.orthogonalize(owned.stack)

    def apply(self, weights: list[Tensor], updates: list[Tensor], rate: float) -> None:
        """Subtract `rate` times the updates from the weights, in place."""
        torch._foreach_add_(weights, updates, alpha=-rate)

    def end(
        self, norms: Mapping[str, Tensor], before: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group
    ) -> Tensor | None:
        """A factor for the new weights of each matrix, after `apply`; else as `begin`.

        Args:
            norms: by name in `norms_after`.
            before: the norms that `begin` got.
        """
        return None
