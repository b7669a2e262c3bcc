"""Singular-value measures of a matrix and of its orthogonalized update, and the exact polar factor.

Notation (shared/design/theory.md): G = U S V^T is m x n, r = min(m, n), s_1 >= ... >= s_r >= 0; X is the
orthogonalized update, with singular values x_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpectralStats:
    """Measures of one matrix.

    All are 0 for a zero matrix, except that `residual` and `max_deviation` are 1 for a zero update. The last three are
    None without an orthogonalized update.
    """

    s_mean: float
    """Mean singular value, ||G||_* / r."""
    s_max: float
    """Largest singular value, ||G||_2."""
    flatness: float
    """s_mean / s_max, in [1/r, 1]."""
    stable_rank: float
    """||G||_F^2 / ||G||_2^2, in [1, r]."""
    nuclear_rank: float
    """||G||_*^2 / ||G||_F^2, in [1, r] (arXiv 2512.04299)."""
    nuclear_rank_ratio: float
    """nuclear_rank / r."""
    effective_rank: float
    """exp of the entropy of p_i = s_i / sum(s), in [1, r] (Roy and Vetterli, EUSIPCO 2007)."""
    residual: float | None = None
    """||X X^T - I||_F / sqrt(r), on the shorter side: sqrt(mean((x_i^2 - 1)^2))."""
    max_deviation: float | None = None
    """max |x_i - 1|."""
    cosine: float | None = None
    """<X, U V^T> / (||X||_F ||U V^T||_F), with U V^T over the nonzero s_i; 0 if X or U V^T is zero."""


def _as_stack(x: Tensor, name: str) -> Tensor:
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be a matrix (M, N) or a stack (B, M, N), got shape {tuple(x.shape)}")
    if not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"{name} must be a non-empty tensor of real floating numbers, got {x.dtype} {tuple(x.shape)}")
    return x.detach().to(torch.float64).reshape(-1, *x.shape[-2:])


def _finite_or_zero(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The stack with 0 in place of matrices that are not finite, which LAPACK refuses, and a correction (B, 1).

    The correction is 0 for finite matrices and NaN for the others. Add it to all results.
    """
    finite = stack.isfinite().all(dim=-1).all(dim=-1)
    poison = stack.new_zeros(len(stack), 1).masked_fill(~finite[:, None], torch.nan)
    return stack.masked_fill(~finite[:, None, None], 0.0), poison


def _svd(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (B, r) and polar factors (B, M, N) of fp64 matrices of any scale.

    In the polar factor, singular values below max(M, N) * eps(fp64) times the largest count as zero.
    """
    stack, poison = _finite_or_zero(stack)
    scale = stack.abs().amax(dim=(-2, -1), keepdim=True)
    u, s, vt = torch.linalg.svd(stack / torch.where(scale == 0, torch.ones_like(scale), scale), full_matrices=False)
    kept = s > max(stack.shape[-2:]) * torch.finfo(torch.float64).eps * s[:, :1]
    return s * scale.squeeze(-1) + poison, (u * kept.unsqueeze(-2)) @ vt + poison.unsqueeze(-1)


@torch.no_grad()
def polar_factor(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The exact polar factor U V^T of every matrix, by a singular value decomposition in fp64.

    Directions with singular value zero (in fp64) are left out, so the polar factor of a zero matrix is 0. Note that
    rounding gives almost every stored matrix full rank: a rank-1 product rounded to fp32 has a polar factor that
    consists mostly of rounding errors, which is exact. NaN or infinity in a matrix gives NaN in all its entries.

    Args:
        x: (M, N) or (B, M, N).
        dtype: dtype of the result; None: that of `x`.

    Raises:
        ValueError: not a non-empty matrix or stack of real floating numbers.
    """
    return _svd(_as_stack(x, "x"))[1].reshape(x.shape).to(dtype or x.dtype)


def spectral_stats(x: Tensor, orthogonalized: Tensor | None = None) -> SpectralStats:
    """Measures of the matrix `x` (M, N) and optionally of its orthogonalized update (M, N), in fp64.

    A NaN or an infinity in `x` or in `orthogonalized` makes the measures that depend on it NaN.

    Raises:
        ValueError: not a non-empty matrix of real floating numbers, or the two shapes differ.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix (M, N), got shape {tuple(x.shape)}; spectral_stats_batch takes stacks")
    return spectral_stats_batch(x, orthogonalized)[0]


@torch.no_grad()
def spectral_stats_batch(x: Tensor, orthogonalized: Tensor | None = None) -> tuple[SpectralStats, ...]:
    """`spectral_stats` of every matrix of a stack (B, M, N), with one batched decomposition.

    Raises:
        ValueError: not a non-empty stack of real floating numbers, or the two shapes differ.
    """
    if orthogonalized is not None and orthogonalized.shape != x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, orthogonalized has {tuple(orthogonalized.shape)}")
    singular, polar = _svd(_as_stack(x, "x"))
    columns = _input_measures(singular)
    if orthogonalized is not None:
        columns += _update_measures(_as_stack(orthogonalized, "orthogonalized"), polar)
    return tuple(SpectralStats(*row) for row in torch.stack(columns, dim=-1).tolist())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, torch.zeros_like(numerator), numerator / denominator.masked_fill(zero, 1.0))


def _input_measures(singular: Tensor) -> list[Tensor]:
    """s_mean to effective_rank, each (B,), from the singular values (B, r), largest first."""
    largest = singular[:, 0]
    relative = _ratio(singular, largest[:, None])  # so that squares neither overflow nor underflow
    total, squares = relative.sum(dim=-1), relative.square().sum(dim=-1)
    nuclear_rank = _ratio(total.square(), squares)
    entropy = torch.special.entr(_ratio(relative, total[:, None])).sum(dim=-1)
    return [
        singular.mean(dim=-1),
        largest,
        relative.mean(dim=-1),
        squares,
        nuclear_rank,
        nuclear_rank / singular.size(-1),
        torch.where(largest == 0, torch.zeros_like(entropy), entropy.exp()),
    ]


def _update_measures(update: Tensor, polar: Tensor) -> list[Tensor]:
    """residual, max_deviation and cosine, each (B,), of orthogonalized updates (B, M, N)."""
    update, poison = _finite_or_zero(update)
    values = torch.linalg.svdvals(update) + poison
    residual = (values.square() - 1.0).square().mean(dim=-1).sqrt()
    inner = (update * polar).sum(dim=(-2, -1))
    norms = torch.linalg.vector_norm(update, dim=(-2, -1)) * torch.linalg.vector_norm(polar, dim=(-2, -1))
    return [residual, (values - 1.0).abs().amax(dim=-1), _ratio(inner, norms) + poison.squeeze(-1)]
