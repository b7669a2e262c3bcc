"""Spectral measures against hand-computed values, and the polar factor against its definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from muon_dist.numerics import newton_schulz, polar_factor, spectral_stats, spectral_stats_batch
from tests.numerics.spectra import gaussian, log_spaced, relative_error, with_spectrum


def test_measures_of_a_known_spectrum() -> None:
    x, _ = with_spectrum(4, 9, torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64), seed=0)
    stats = spectral_stats(x)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert stats.s_mean == pytest.approx(2.0)
    assert stats.s_max == pytest.approx(4.0)
    assert stats.flatness == pytest.approx(0.5)
    assert stats.stable_rank == pytest.approx(22 / 16)
    assert stats.nuclear_rank == pytest.approx(64 / 22)
    assert stats.nuclear_rank_ratio == pytest.approx(64 / 22 / 4)
    assert stats.effective_rank == pytest.approx(math.exp(entropy))
    assert (stats.residual, stats.max_deviation, stats.cosine) == (None, None, None)


def test_measures_of_an_orthogonalized_update() -> None:
    x, polar = with_spectrum(3, 5, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), seed=1)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    update = (u * torch.tensor([1.2, 1.0, 0.7], dtype=torch.float64)) @ vt
    stats = spectral_stats(x, update)
    assert stats.residual == pytest.approx(math.sqrt((0.44**2 + 0.51**2) / 3))
    gram = update @ update.T - torch.eye(3, dtype=torch.float64)
    assert stats.residual == pytest.approx(float(torch.linalg.matrix_norm(gram)) / math.sqrt(3))
    assert stats.max_deviation == pytest.approx(0.3)
    assert stats.cosine == pytest.approx(2.9 / math.sqrt((1.44 + 1 + 0.49) * 3))
    assert spectral_stats(x, polar).cosine == pytest.approx(1.0)
    assert spectral_stats(x, -polar).cosine == pytest.approx(-1.0)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (1, 7), (7, 1)])
def test_equal_singular_values_are_the_extreme_of_every_rank(shape: tuple[int, int]) -> None:
    rank = min(shape)
    x, _ = with_spectrum(*shape, torch.full((rank,), 3.0, dtype=torch.float64), seed=2)
    stats = spectral_stats(x, x / 3)
    for value in (stats.stable_rank, stats.nuclear_rank, stats.effective_rank):
        assert value == pytest.approx(rank)
    assert stats.flatness == pytest.approx(1.0)
    assert stats.nuclear_rank_ratio == pytest.approx(1.0)
    assert stats.residual == pytest.approx(0.0, abs=1e-12)
    assert stats.max_deviation == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_ratios_do_not_depend_on_scale(factor: float) -> None:
    x = gaussian(6, 10, seed=3)
    update = newton_schulz(x)
    plain, scaled = spectral_stats(x, update), spectral_stats(x * factor, update)
    for field in dataclasses.fields(plain):
        expected = getattr(plain, field.name) * (factor if field.name in ("s_mean", "s_max") else 1.0)
        assert getattr(scaled, field.name) == pytest.approx(expected), field.name


def test_zero_is_defined() -> None:
    zero = torch.zeros(4, 6)
    stats = dataclasses.asdict(spectral_stats(zero, zero))
    assert stats.pop("residual") == stats.pop("max_deviation") == 1.0
    assert set(stats.values()) == {0.0}
    assert torch.equal(polar_factor(zero), zero)


def test_a_stack_is_measured_matrix_by_matrix() -> None:
    x = gaussian(4, 6, 10, seed=4).float()
    x[1] = 0
    update = newton_schulz(x)
    batch = spectral_stats_batch(x, update)
    for i in range(4):
        alone = spectral_stats(x[i], update[i])
        for field in dataclasses.fields(alone):
            assert getattr(batch[i], field.name) == pytest.approx(getattr(alone, field.name)), (i, field.name)


def test_bad_entries_are_reported_as_nan() -> None:
    x = gaussian(3, 4, 6, seed=5).float()
    update = newton_schulz(x)
    bad = x.clone()
    bad[1, 0, 0] = torch.nan
    first, second, _ = spectral_stats_batch(bad, update)
    assert math.isnan(second.s_max) and math.isnan(second.effective_rank) and math.isnan(second.cosine or 0)
    assert first == spectral_stats_batch(x, update)[0]
    assert polar_factor(bad)[1].isnan().all() and polar_factor(bad)[0].isfinite().all()
    broken = spectral_stats(x[0], torch.full_like(x[0], torch.inf))
    assert math.isfinite(broken.s_max)
    assert all(math.isnan(value or 0) for value in (broken.residual, broken.max_deviation, broken.cosine))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="spectral_stats_batch takes stacks"):
        spectral_stats(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"orthogonalized has \(3, 2\)"):
        spectral_stats(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="must be a matrix"):
        polar_factor(torch.ones(3))
    with pytest.raises(ValueError, match="non-empty"):
        polar_factor(torch.ones(0, 3))


@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (8, 8), (1, 5)])
def test_polar_factor_is_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    x, polar = with_spectrum(*shape, log_spaced(min(shape), 1e6), seed=6)
    found = polar_factor(x)
    assert relative_error(found, polar) < 1e-8
    assert relative_error(polar_factor(1e-200 * x), polar) < 1e-8
    assert polar_factor(x.float()).dtype == torch.float32
    assert polar_factor(x.float(), dtype=torch.float64).dtype == torch.float64


def test_polar_factor_of_an_exactly_rank_one_matrix() -> None:
    x = torch.zeros(4, 6, dtype=torch.float64)
    x[1, 2] = 5.0
    assert torch.allclose(polar_factor(x), x / 5, rtol=0, atol=1e-15)


def test_polar_factors_of_a_stack() -> None:
    x = gaussian(3, 5, 9, seed=7)
    assert torch.allclose(polar_factor(x), torch.stack([polar_factor(matrix) for matrix in x]), rtol=0, atol=1e-12)
