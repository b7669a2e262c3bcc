"""The expected fp64 momentum of one followed matrix, and its momentum under each known fault."""

from __future__ import annotations

import torch
from torch import Tensor

BASE, BF16, SCALED, CLIPPED, LOCAL, STALE, RESET, TWICE = (
    "base", "bf16", "scaled", "clipped", "local", "stale", "reset", "twice"
)  # fmt: skip


class Memory:
    """Running means of a matrix's gradient from its first step on.

    Attributes:
        steps: number of gradients so far.
        zeros: number of exactly zero gradients in a row, up to the last one.
        moved: whether an earlier gradient was not zero.
        means: label -> running mean. "base" is right; "bf16" is stored in bf16; "scaled" has loss-scaled gradients,
            "twice" gradients divided by the loss scale twice, "clipped" clipped gradients, "local" gradients of this
            rank only; "stale" and "reset" exist after a load.
        gradients: label -> gradient of this step; a label without an entry uses the gradient of "base".
        adam: running means of the gradient and of its square, for `betas`, without bias correction.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.steps = 0
        self.zeros = 0
        self.moved = False
        self.means: dict[str, Tensor] = {BASE: torch.zeros(shape, dtype=torch.float64, device=device)}
        self.gradients: dict[str, Tensor] = {}
        self.adam: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}
        self.rows: Tensor | None = None  # NorMuon's second moments of rows, (m, 1)

    def take(self, gradients: dict[str, Tensor], momentum: float, betas: tuple[tuple[float, float], ...]) -> None:
        """Add the gradients of one step, by label; `gradients["base"]` is required."""
        base = gradients[BASE]
        self.steps += 1
        zero = not bool(base.any())
        self.zeros = self.zeros + 1 if zero else 0
        self.moved |= not zero
        self.gradients = gradients
        for label in {*self.means, *gradients, BF16}:
            mean = self.means.get(label)
            if mean is None:  # a new label was equal to the base until now
                mean = self.means[BASE].clone() if label != BF16 else self.means[BASE].bfloat16().double()
            self.means[label] = mean  # the base is updated last, so that new labels start from its old value
        for label, mean in self.means.items():
            mean.lerp_(gradients.get(label, base), 1 - momentum)
            if label == BF16:
                mean.copy_(mean.bfloat16())
        for pair in betas:
            first, second = self.adam.setdefault(pair, (torch.zeros_like(base), torch.zeros_like(base)))
            first.lerp_(base, 1 - pair[0])
            second.lerp_(base.square(), 1 - pair[1])

    def look_ahead(self, label: str, momentum: float, nesterov: bool) -> Tensor:
        """The matrix that this step orthogonalizes: the running mean, with Nesterov blended with the gradient."""
        mean = self.means[label]
        gradient = self.gradients.get(label, self.gradients[BASE])
        return gradient.lerp(mean, momentum) if nesterov else mean

    def adam_update(self, betas: tuple[float, float], eps: float) -> Tensor:
        """AdamW's update of this step for a learning rate of 1, with bias correction."""
        first, second = self.adam[betas]
        mean = first / (1 - betas[0] ** self.steps)
        return mean / ((second / (1 - betas[1] ** self.steps)).sqrt() + eps)

    def copy(self) -> Memory:
        other = Memory.__new__(Memory)
        other.steps, other.zeros, other.moved = self.steps, self.zeros, self.moved
        other.means = {k: v.clone() for k, v in self.means.items()}
        other.gradients = {}
        other.adam = {k: (m.clone(), v.clone()) for k, (m, v) in self.adam.items()}
        other.rows = None if self.rows is None else self.rows.clone()
        return other

    def to(self, device: torch.device) -> None:
        self.means = {k: v.to(device) for k, v in self.means.items()}

    def keep_rows(self, orthogonalized: Tensor) -> None:
        """Update NorMuon's second moments of the rows for one step."""
        before = self.rows if self.rows is not None else torch.zeros_like(orthogonalized[:, :1])
        self.rows = before.lerp(orthogonalized.square().mean(dim=1, keepdim=True), 0.05)

    def after_load(self, kept: Memory | None) -> None:
        """Also track from now on the momentum from before the load (`kept`), and momentum that starts at zero."""
        if kept is not None:
            self.means[STALE] = kept.means[BASE].clone()
        self.means[RESET] = torch.zeros_like(self.means[BASE])
