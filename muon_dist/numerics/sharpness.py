"""Stable step lengths, from directional sharpness by Hessian-vector products.

Notation (shared/design/theory.md, R1): at a point with gradient G and Hessian H, along an update U,
NDS(U) = <U, HU> / ||U||_F^2 is the normalised directional sharpness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A function from a flat vector to the (symmetric) curvature times this vector."""


@dataclass(frozen=True)
class StableStep:
    """Bounds on the length of a step along -U, in units of U.

    The threshold (bound) is infinite if the curvature along the update (the largest curvature) is not positive, and 0
    or below if the update does not descend.
    """

    slope: float
    """<G, U>: to first order, the loss falls by the step length times this."""
    nds_update: float
    """<U, HU> / ||U||_F^2."""
    nds_gradient: float
    """<G, HG> / ||G||_F^2."""
    largest: float
    """L: the largest eigenvalue of H, by Lanczos; never larger than the true one."""
    threshold: float
    """2 <G, U> / <U, HU>: the step length at which the quadratic model of the loss is back at its starting value."""
    bound: float
    """2 <G, U> / (L ||U||_F^2) <= threshold. For U = polar factor of G it is (2 / L) s_mean, the paper's bound."""


def largest_eigenvalue(
    product: Product, like: Tensor, steps: int, seed: int = 0, *, reorthogonalize: bool = False
) -> float:
    """Largest (algebraic) eigenvalue of a symmetric operator on flat vectors like `like`, by Lanczos.

    The result is never larger than the true eigenvalue. Starts from random numbers with `seed`; at most `like.numel()`
    steps.

    reorthogonalize: True: keep all vectors and project each new vector against them, twice. False: keep only three
        vectors; converged eigenvalues may then appear several times, but the largest is the same.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.numel(), generator=generator).to(like)
    basis = [vector / vector.norm()]
    previous, beta = torch.zeros_like(vector), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, like.numel())):
        vector = basis[-1]
        w = product(vector) - beta * previous
        alphas.append(float(w @ vector))
        w = w - alphas[-1] * vector
        if reorthogonalize:
            stack = torch.stack(basis)
            for _ in range(2):
                w = w - stack.T @ (stack @ w)
        beta = float(w.norm())
        if not beta > 1e-7 * max(map(abs, alphas)):
            break
        betas.append(beta)
        previous = vector
        basis = [*basis, w / beta] if reorthogonalize else [w / beta]
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def stable_step(gradient: Tensor, update: Tensor, product: Product, *, lanczos: int = 12) -> StableStep:
    """The stable step along -`update`; all vectors are flat. Costs 2 + `lanczos` products.

    Raises:
        ValueError: the shapes differ, or `lanczos` is below 1.
    """
    if gradient.ndim != 1 or gradient.shape != update.shape or lanczos < 1:
        raise ValueError(f"expected flat vectors of one length and lanczos >= 1, got {update.shape}, {lanczos}")
    slope, square = float(gradient @ update), float(update @ update)
    along = float(update @ product(update))
    return StableStep(
        slope=slope,
        nds_update=along / square if square else 0.0,
        nds_gradient=_quotient(gradient, product),
        largest=(largest := largest_eigenvalue(product, update, lanczos)),
        threshold=2 * slope / along if along > 0 else math.inf,
        bound=2 * slope / (largest * square) if largest > 0 and square else math.inf,
    )


def _quotient(vector: Tensor, product: Product) -> float:
    square = float(vector @ vector)
    return float(vector @ product(vector)) / square if square else 0.0


class Curvature:
    """Gradient and Hessian-vector products of one loss. This object keeps the graph of the loss.

    Args:
        loss: a scalar that can be differentiated twice (attention by its plain formula, not by a fused kernel).
        parameters: tensors on which it depends.

    Attributes:
        gradients: gradients of the parameters, detached.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._graph = torch.autograd.grad(loss, self.parameters, create_graph=True)
        self.gradients = [g.detach() for g in self._graph]

    def product(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """H v. v has a tensor or None (zero) per parameter; the result has None at the same positions."""
        given = [i for i, v in enumerate(vectors) if v is not None]
        pairs = ((self._graph[i], v) for i, v in enumerate(vectors) if v is not None)
        directional = torch.stack([(g * v).sum() for g, v in pairs]).sum()
        wanted = [self.parameters[i] for i in given]
        found = torch.autograd.grad(directional, wanted, retain_graph=True, materialize_grads=True)
        result: list[Tensor | None] = [None] * len(vectors)
        for i, value in zip(given, found, strict=True):
            result[i] = value
        return result
