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
"""The tensors of which a rule may ask the norms, or which it may send to the owners (`sends`)."""

Size = Callable[[Matrix], int]
"""How many numbers of something there are for a matrix."""


@dataclass
class Owned:
    """Matrices of one shape and one parameter group on their owner, whole.

    Attributes:
        stack: (B, rows, cols) in fp32: what the sources sent; a rule writes the update over it.
        matrices: the B matrices; all of them are stored (out, in), or all (in, out).
        orthogonalize: replaces a stack (B, rows, cols) by its orthogonalized update.
        memory: by name of `owner_memory`, for each of the B matrices its numbers, 1-D in fp32; written in place.
        sent: by name of `sends`, that tensor of the B matrices, (B, rows, cols) in fp32.
        factors: (B,) in fp64: what `begin` returned for these matrices; None if it returned None.
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
        weights: changed in place.
        positions: of each weight, the place of its matrix in the group.
        factors: by that place, (n,) in fp64: what `begin` returned; None if it returned None.
        lr: the learning rate of the group.
        updates: what `apply` will subtract, of the shapes of `weights`, where it is known already: for rules that
            `decays_late`.
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

    A rule is one object without state of its own. A step calls it in this order:

    1. `remember`: every rank updates the momentum that it holds.
    2. `begin`: every rank computes a factor for each matrix, from norms over all fragments of the matrix.
    3. `decay`: every rank decays the weights that it holds.
    4. `send`: every rank writes what it sends to the owners.
    5. `receive`, with `momentum_at_owner` alone: the owner makes momentum of the gradients that it got. Then
       `direction`: the owner replaces the whole matrix by its update.
    6. `apply`: every rank changes the weights that it holds.
    7. `end`: as `begin`, for a factor on the new weights.

    Attributes:
        name: value of the option `rule`.
        options: names of `rule_options`, and their defaults.
        scale: default of the option `scale`.
        defaults: other options whose default differs from Muon's.
        refused: options that the rule does not have, and why.
        elsewhere: names of the paper that are not among `rule_options`, and the option of the group that they are.
        shrinks_with_momentum: the update becomes small with the momentum. Otherwise the step makes it smaller while
            the gradient of a matrix is exactly zero, since Newton-Schulz brings any momentum back to full size.
        owner_memory: what the owner of a matrix keeps, and how many fp32 numbers of it; all are zero at first.
        sends: what the owner gets of the whole matrix beside what `send` writes: "gradient" (times the clip that an
            adapter takes back) or "weight", before this step's decay if the rule `decays_late`. Costs the bytes of
            another gather.
        decays_late: `decay` depends on the update: it is called once more, with it, right before `apply`.
        momentum_at_owner: the sources keep no momentum and send gradients; `receive` makes momentum on the owner.
        gradient_stays: `receive` leaves the gradient in `Owned.sent`, though no source sends it a second time.
        matrix_memory: what every rank keeps: one fp64 number for each matrix.
        feature_norms: `direction` gets the norm of each output feature of the weight before the step, in
            `Owned.feature_norms`. Costs one small all-reduce.
        norms_first: tensors of which `start` gets the norms.
        norms_before: tensors of which `begin` gets the norms.
        norms_after: tensors of which `end` gets the norms.
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
        """Whether `start`, `begin` or `end` does anything."""
        return bool(self.matrix_memory or self.norms_before or self.norms_after)

    @property
    def sends_iteration(self) -> bool:
        """Whether the update is what Newton-Schulz has returned, so that the dtype of the iteration holds it."""
        return type(self).direction is MuonRule.direction

    def problem(self, group: Group) -> str | None:
        """The error in the values of `rule_options`, as text for a ConfigError; None if they are right."""
        return None

    def remember(self, momentum: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        """Update fp32 momentum in place from fp32 gradients of the same shapes."""
        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])

    def start(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Prepare the memory of matrices that are stepped for the first time, or since their memory was loaded.

        Args:
            norms: of `norms_first`, the Frobenius norm of each of the n matrices, (n,) in fp64.
            memory: of `matrix_memory`, (n,) in fp64, zero where nothing was loaded; written in place.
            names: of the matrices, for messages.
        """

    def begin(self, norms: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group) -> Tensor | None:
        """A factor for each of the n matrices, (n,) in fp64, equal on all ranks; None if the rule needs none.

        Args:
            norms: of `norms_before`, as in `start`.
            memory: as in `start`.
        """
        return None

    def decay(self, held: HeldWeights, group: Group) -> None:
        """Decay the weights in place."""
        factor = 1 - held.lr * group["weight_decay"]
        if factor == 1.0:
            return
        if any(w.device.type == "cpu" and w.dtype.itemsize < 4 for w in held.weights):
            # On a CPU torch._foreach_mul_ first rounds the factor to the dtype: .998 becomes .9961 in bfloat16.
            for w in held.weights:
                w.mul_(factor)
        else:
            torch._foreach_mul_(held.weights, factor)

    def send(self, out: list[Tensor], momentum: list[Tensor], group: Group) -> None:
        """Write what the owners get into `out`, in fp32.

        If the group has `nesterov`, or the rule `momentum_at_owner`, `out` holds the gradients.
        """
        if group["nesterov"]:
            torch._foreach_lerp_(out, momentum, group["momentum"])
        else:
            torch._foreach_copy_(out, momentum)

    def receive(self, owned: Owned, group: Group) -> None:
        """Replace the gradients in `owned.stack` by what is orthogonalized; only with `momentum_at_owner`."""

    def direction(self, owned: Owned, group: Group) -> None:
        """Replace `owned.stack` by the update, which `apply` multiplies by the learning rate and by `scale`."""
        owned.orthogonalize(owned.stack)

    def apply(self, weights: list[Tensor], updates: list[Tensor], rate: float) -> None:
        """Subtract `rate` times the updates from the weights, in place."""
        torch._foreach_add_(weights, updates, alpha=-rate)

    def end(
        self, norms: Mapping[str, Tensor], before: Mapping[str, Tensor], memory: Mapping[str, Tensor], group: Group
    ) -> Tensor | None:
        """A factor for the weights of each matrix after `apply`; as `begin`.

        Args:
            norms: of `norms_after`.
            before: what `begin` got.
        """
        return None
