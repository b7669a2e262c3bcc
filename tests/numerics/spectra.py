"""Matrices with known singular values, and the readable fp64 Newton-Schulz that the fast one is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Row = tuple[float, float, float]


def with_spectrum(m: int, n: int, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """An (m, n) fp64 matrix U diag(values) V^T with random U and V, and its polar factor U V^T."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(values)
    u = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator)).Q
    return (u * values) @ v.T, u @ v.T


def gaussian(*shape: int, seed: int) -> Tensor:
    """Standard normal entries, fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_spaced(rank: int, condition: float) -> Tensor:
    """`rank` values from 1 down to 1 / condition, in equal ratios."""
    return condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)


def power_law(rank: int, exponent: float) -> Tensor:
    """i^-exponent."""
    return torch.arange(1, rank + 1, dtype=torch.float64) ** -exponent


def reference(x: Tensor, rows: Sequence[Row], safety: float) -> Tensor:
    """Newton-Schulz on a matrix as the papers print it, in fp64, Frobenius-normalised."""
    y = x.double() / (safety * torch.linalg.matrix_norm(x.double()))
    if y.size(0) > y.size(1):
        return reference(x.T, rows, safety).T
    for a, b, c in rows:
        gram = y @ y.T
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y


def relative_error(x: Tensor, expected: Tensor) -> float:
    """||x - expected||_F / ||expected||_F."""
    expected = expected.double()
    return float(torch.linalg.vector_norm(x.double() - expected) / torch.linalg.vector_norm(expected))
