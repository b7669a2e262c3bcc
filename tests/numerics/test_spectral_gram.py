"""Measures from Gram matrices against those from singular value decompositions."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from muon_dist.numerics import newton_schulz, spectral_stats
from muon_dist.numerics.spectral_gram import gram_spectral_stats


def matrix(m: int, n: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))
    s = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return ((u * s) @ v.T * 3e-4).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 7)])
def test_against_the_decomposition(shape: tuple[int, int], condition: float, dtype: torch.dtype) -> None:
    g = matrix(*shape, condition)
    update = newton_schulz(g, dtype=dtype)
    expected = asdict(spectral_stats(g, update))
    found = asdict(gram_spectral_stats(g, update))
    # The smallest singular values are lost in the squaring; their sums are not, and of the cosine a little.
    assert found.pop("cosine") == pytest.approx(expected.pop("cosine"), rel=1e-7)
    assert found == pytest.approx(expected, rel=1e-9)


def test_rounding_errors_are_no_directions() -> None:
    """A rank-2 product stored in fp32 has two directions here, and the sums do not see the rest."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    exact = g.double() @ torch.eye(96, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    found = gram_spectral_stats(g, u[:, :2] @ vt[:2])
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.nuclear_rank == pytest.approx(float(s[:2].sum() ** 2 / s[:2].square().sum()), rel=1e-4)
    assert found.residual == pytest.approx((62 / 64) ** 0.5, rel=1e-9)


def test_zero_and_poisoned_matrices() -> None:
    zero = gram_spectral_stats(torch.zeros(4, 6), torch.zeros(4, 6))
    assert asdict(zero) == asdict(spectral_stats(torch.zeros(4, 6), torch.zeros(4, 6)))
    g, update = torch.eye(4), torch.eye(4)
    g[1, 2] = torch.nan
    stats = gram_spectral_stats(g, update)
    assert stats.s_mean != stats.s_mean and stats.cosine != stats.cosine
    assert stats.residual == pytest.approx(0.0, abs=1e-12)


def test_refuses_two_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        gram_spectral_stats(torch.ones(2, 3), torch.ones(3, 2))
