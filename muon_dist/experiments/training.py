"""The one training loop of E2, E3, E6, E7 and E8, and the update rules that they compare.

Every rule turns the momentum of a matrix into a direction of known size and takes lr times it, with no factor for the
shape, so that the thresholds of docs/theory.md apply as they stand. Convolution kernels (O, I, h, w) are the matrices
(O, I h w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from muon_dist.numerics import newton_schulz, polar_factor

Kind = Literal["sgd", "nsgd", "spectral", "muon", "polar", "random", "adam", "flat_adam"]

LABELS: dict[str, str] = {
    "sgd": "SGD",
    "nsgd": "NSGD (same Frobenius norm)",
    "spectral": "spectral-norm SGD",
    "muon": "Muon",
    "polar": "Muon (exact polar factor)",
    "random": "random spectrum (Kaon)",
    "adam": "AdamW",
    "flat_adam": "flattened Adam",
}


@dataclass(frozen=True)
class Rule:
    """How a matrix is updated: W <- W - lr direction(momentum).

    ``beta`` is that of an exponential moving average (the gradient enters with weight 1 - beta, so that lr means the
    same with and without momentum). ``steps`` and ``schedule`` belong to Newton-Schulz.
    """

    kind: Kind
    lr: float
    beta: float = 0.0
    nesterov: bool = False
    steps: int = 5
    schedule: str = "keller"
    beta2: float = 0.95
    eps: float = 1e-8


def random_spectrum(momentum: Tensor, generator: torch.Generator) -> Tensor:
    """U diag(xi) V^T, xi uniform in (0, 1) and scaled to root mean square 1: the norm of Muon, no flatness.

    In the spirit of Kaon (arXiv 2605.11181), which replaces the singular values by noise.
    """
    u, _, vt = torch.linalg.svd(momentum, full_matrices=False)
    xi = torch.rand(vt.shape[0], generator=generator, dtype=momentum.dtype)
    return u @ ((xi / xi.square().mean().sqrt())[:, None] * vt)


def direction(rule: Rule, momentum: Tensor, generator: torch.Generator) -> Tensor:
    """The update direction of a matrix (m, n) for every rule but the Adam ones. A zero matrix gives zero."""
    if rule.kind == "sgd":
        return momentum
    if rule.kind == "muon":
        return newton_schulz(momentum, rule.steps, rule.schedule)
    norm = float(torch.linalg.vector_norm(momentum))
    if norm == 0.0 or not math.isfinite(norm):
        return momentum * 1.0
    if rule.kind == "nsgd":
        return momentum * (min(momentum.shape) ** 0.5 / norm)
    if rule.kind == "spectral":
        return momentum / torch.linalg.matrix_norm(momentum, ord=2)
    if rule.kind == "polar":
        return polar_factor(momentum)
    if rule.kind == "random":
        return random_spectrum(momentum, generator)
    raise ValueError(f"{rule.kind!r} is not a direction of one momentum")


@dataclass
class MatrixOptimizer:
    """Applies one rule to a list of parameters, each seen as a matrix."""

    params: Sequence[nn.Parameter]
    rule: Rule
    seed: int = 0
    count: int = 0
    squared_norms: float = 0.0
    momentum: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.momentum = [torch.zeros_like(p).flatten(1) for p in self.params]
        if self.rule.kind in ("adam", "flat_adam"):
            self.second = [torch.zeros_like(m) for m in self.momentum]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.count += 1
        for i, p in enumerate(self.params):
            assert p.grad is not None
            g = p.grad.flatten(1)
            self.momentum[i].lerp_(g, 1 - self.rule.beta)
            m = torch.lerp(g, self.momentum[i], self.rule.beta) if self.rule.nesterov else self.momentum[i]
            update = self._adam(i, g) if self.second else direction(self.rule, m, self.generator)
            self.squared_norms += float(update.square().sum())
            p.sub_(lr * update.view_as(p))

    @property
    def update_norm(self) -> float:
        """Root mean square over the steps of the Frobenius norm of all matrices' directions together, at lr = 1."""
        return math.sqrt(self.squared_norms / max(self.count, 1))

    def _adam(self, i: int, g: Tensor) -> Tensor:
        """Adam's direction (Kingma and Ba, 2014), as it is or with its spectrum flattened by Newton-Schulz."""
        rule = self.rule
        self.second[i].lerp_(g.square(), 1 - rule.beta2)
        first = self.momentum[i] / (1 - rule.beta**self.count)
        update = first / ((self.second[i] / (1 - rule.beta2**self.count)).sqrt() + rule.eps)
        return newton_schulz(update, rule.steps, rule.schedule) if rule.kind == "flat_adam" else update


@dataclass
class Trace:
    """Losses of a run, one per step, and when it blew up (None: never)."""

    losses: list[float] = field(default_factory=list)
    blown_up_at: int | None = None

    @property
    def first(self) -> float:
        return self.losses[0]

    def last(self, count: int = 10) -> float:
        """Mean of the last losses."""
        tail = self.losses[-count:]
        return sum(tail) / len(tail)


def train(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: MatrixOptimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    decay: bool = False,
    others: torch.optim.Optimizer | None = None,
    blow_up: float = math.inf,
    after_step: Callable[[int], bool] | None = None,
) -> Trace:
    """Train for ``steps`` batches.

    Args:
        loss_of: (x, y) -> scalar loss, with a graph.
        optimizer: of the matrices.
        batches: yields (x, y); the loss recorded for step t is that before update t.
        steps: number of updates.
        decay: lr falls linearly to zero over the run (also that of ``others``).
        others: optimizer of all parameters that are not matrices (E8: embeddings and head).
        blow_up: stop when a loss is not finite or exceeds this multiple of the first one.
        after_step: called with the number of updates done; True ends the run.
    """
    trace = Trace()
    base = [group["lr"] for group in others.param_groups] if others is not None else []
    for t in range(steps):
        x, y = next(batches)
        loss = loss_of(x, y)
        value = loss.item()
        trace.losses.append(value)
        if not math.isfinite(value) or value > blow_up * trace.first:
            trace.blown_up_at = t
            return trace
        for p in optimizer.params:
            p.grad = None
        if others is not None:
            others.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        factor = 1 - t / steps if decay else 1.0
        optimizer.step(optimizer.rule.lr * factor)
        if others is not None:
            for group, lr in zip(others.param_groups, base, strict=True):
                group["lr"] = lr * factor
            others.step()
        if after_step is not None and after_step(t + 1):
            return trace
    return trace
