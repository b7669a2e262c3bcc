"""Quadratics f(D) = 1/2 <D, H[D]> whose Hessian is diagonal in the coordinates used, and descent on them.

A Kronecker Hessian H[X] = A X B is diagonal once A and B are: everything here (polar factor, Frobenius norm, Gaussian
starting points) commutes with rotations from the left and the right, so nothing is lost by taking the eigenbases of
A and B as coordinates. H is then an array h of the same shape as D, h[i, j] = a[i] b[j], and a Hessian that is *not*
Kronecker is an array that is not an outer product. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.numerics import polar_factor

Direction = Callable[[Tensor], Tensor]
"""Gradient (B, m, n) -> direction (B, m, n)."""

Step = Callable[["Quadratic", Tensor, Tensor, int, Tensor], Tensor]
"""(quadratic, gradient, direction, iteration, rows) -> step sizes (B,); rows are the indices still running."""


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Frobenius inner product over the last two axes, (..., m, n) -> (...)."""
    return (x * y).sum(dim=(-2, -1))


@dataclass(frozen=True)
class Quadratic:
    """f(D) = 1/2 <D, h * D>, with h (m, n) positive."""

    h: Tensor

    @property
    def smoothness(self) -> float:
        """L, the largest eigenvalue of the Hessian."""
        return float(self.h.max())

    @property
    def convexity(self) -> float:
        """mu, the smallest eigenvalue of the Hessian."""
        return float(self.h.min())

    def value(self, d: Tensor) -> Tensor:
        return 0.5 * inner(d, self.h * d)

    def gradient(self, d: Tensor) -> Tensor:
        return self.h * d

    def curvature(self, x: Tensor) -> Tensor:
        """<X, H[X]>."""
        return inner(x, self.h * x)

    def nds(self, x: Tensor) -> Tensor:
        """Normalised directional sharpness <X, H[X]> / ||X||_F^2 (arXiv 2606.04662)."""
        return self.curvature(x) / inner(x, x)

    def stable_step(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Exact one-step threshold: f(D - eta X) < f(D) for 0 < eta < 2 <G, X> / <X, H[X]>."""
        return 2 * inner(gradient, x) / self.curvature(x)

    def efficiency(self, d: Tensor, x: Tensor) -> Tensor:
        """e(X) = <G, X>^2 / (2 f <X, H[X]>): relative decrease of f by the best step along X."""
        return inner(self.gradient(d), x) ** 2 / (2 * self.value(d) * self.curvature(x))


def log_spaced(kappa: float, count: int) -> Tensor:
    """(count,) eigenvalues from 1/kappa to 1, evenly spaced in the logarithm."""
    return torch.logspace(-torch.log10(torch.tensor(kappa)).item(), 0, count, dtype=torch.float64)


def kronecker(rows: int, cols: int, kappa_a: float, kappa_b: float) -> Quadratic:
    """H = A (x) B with log-spaced spectra of condition kappa_a (rows x rows) and kappa_b (cols x cols); L = 1."""
    return Quadratic(torch.outer(log_spaced(kappa_a, rows), log_spaced(kappa_b, cols)))


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_spectrum(singular_values: Tensor, cols: int, generator: torch.Generator) -> Tensor:
    """U diag(s) V^T with Haar-random U (B, m, m) and V (B, n, m), for s (B, m) and m <= n."""
    batch, rows = singular_values.shape
    u = torch.linalg.qr(gaussian((batch, rows, rows), generator)).Q
    v = torch.linalg.qr(gaussian((batch, cols, rows), generator)).Q
    return (u * singular_values[:, None, :]) @ v.mT


def polar(gradient: Tensor) -> Tensor:
    """Exact polar factor O = U V^T of each matrix of (B, m, n)."""
    return polar_factor(gradient)


def polar_of_wide(gradient: Tensor) -> Tensor:
    """(G G^T)^(-1/2) G by the eigenvalues of the small Gram matrix: for m << n and condition numbers below 1e6."""
    values, vectors = torch.linalg.eigh(gradient @ gradient.mT)
    return (vectors * values.rsqrt()[:, None, :]) @ (vectors.mT @ gradient)


def steepest(gradient: Tensor) -> Tensor:
    return gradient


def frobenius_matched(gradient: Tensor) -> Tensor:
    """Normalised SGD with the Frobenius norm of Muon's update: ||X||_F = sqrt(min(m, n))."""
    norm = torch.linalg.matrix_norm(gradient, keepdim=True)
    return gradient * (min(gradient.shape[-2:]) ** 0.5 / norm)


def line_search(q: Quadratic, g: Tensor, x: Tensor, t: int, rows: Tensor) -> Tensor:
    """The best step along X: half the stable step."""
    return 0.5 * q.stable_step(g, x)


def constant(eta: float) -> Step:
    return lambda q, g, x, t, rows: torch.full((len(g),), eta, dtype=g.dtype)


def annealed(start: Tensor, decay: Tensor) -> Step:
    """eta_t = start * decay^t, with one start and one decay for each problem of the batch, (B,) each."""
    return lambda q, g, x, t, rows: start[rows] * decay[rows] ** t


def guaranteed(c: float = 1.0) -> Step:
    """eta_t = c s_mean(G_t) / L: the paper's step, guaranteed not to increase f for c <= 2 with a flat direction."""

    def step(q: Quadratic, g: Tensor, x: Tensor, t: int, rows: Tensor) -> Tensor:
        # <G, O> = ||G||_*, so the mean singular value needs no second decomposition when x is the polar factor
        return c * inner(g, x) / min(g.shape[-2:]) / q.smoothness

    return step


def iterations(q: Quadratic, start: Tensor, direction: Direction, step: Step, tolerance: float, limit: int) -> Tensor:
    """Iterations until f <= tolerance * f(start), for each problem of start (B, m, n); inf when ``limit`` is hit."""
    goal = tolerance * q.value(start)
    found = torch.full((len(start),), float("inf"), dtype=torch.float64)
    rows = torch.arange(len(start))
    d = start
    for t in range(limit):
        g = q.gradient(d)
        x = direction(g)
        d = d - step(q, g, x, t, rows)[:, None, None] * x
        value = q.value(d)
        done = value <= goal[rows]
        found[rows[done]] = t + 1
        # a run far above its start cannot come back under a decaying step: it would only cost decompositions
        keep = ~done & torch.isfinite(value) & (value < 1e8 * goal[rows] / tolerance)
        d, rows = d[keep], rows[keep]
        if not len(rows):
            break
    return found


def predicted_ratio(singular_values: Tensor) -> Tensor:
    """e_Muon / e_SGD = mean(s) mean(s^3) / mean(s^2)^2, from the gradient's spectrum (..., r) alone.

    Derived in docs/theory.md for a Kronecker Hessian, isotropic error and m << n.
    """
    s = singular_values
    return s.mean(-1) * s.pow(3).mean(-1) / s.pow(2).mean(-1) ** 2


def aligned_ratio(a: Tensor, s: float) -> float:
    """e_Muon / e_SGD from the eigenvalues a (m,) of A when C is proportional to A^(2s), m << n; s = 1 is
    ``predicted_ratio`` of the gradient's spectrum. Derived in docs/theory.md."""
    return float(a.pow(s).sum() ** 2 * a.pow(2 * s + 1).sum() / (a.sum() * a.pow(2 * s).sum() ** 2))


def measured_ratio(q: Quadratic, d: Tensor) -> Tensor:
    """e(O) / e(G) on the quadratic, (B,)."""
    g = q.gradient(d)
    return q.efficiency(d, polar(g)) / q.efficiency(d, g)
