"""The quadratics against what is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from muon_dist.experiments.quadratics import (
    Quadratic,
    aligned_ratio,
    annealed,
    constant,
    frobenius_matched,
    gaussian,
    guaranteed,
    inner,
    iterations,
    kronecker,
    line_search,
    log_spaced,
    measured_ratio,
    polar,
    polar_of_wide,
    predicted_ratio,
    steepest,
    with_spectrum,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("direction", [polar, steepest, frobenius_matched])
@pytest.mark.parametrize("kappa", [1.0, 1e4])
def test_stable_step_is_where_f_returns_to_its_start(direction, kappa):
    q = kronecker(6, 9, kappa**0.5, kappa**0.5)
    d = gaussian((4, 6, 9), generator())
    x = direction(q.gradient(d))
    eta = q.stable_step(q.gradient(d), x)[:, None, None]
    assert (q.value(d - 0.999 * eta * x) < q.value(d)).all()
    assert (q.value(d - 1.001 * eta * x) > q.value(d)).all()
    torch.testing.assert_close(q.value(d - eta * x), q.value(d))


def test_isotropic_threshold_is_twice_the_mean_singular_value_over_l():
    s = torch.tensor([[5.0, 1.0, 0.25, 0.01]], dtype=torch.float64)
    g = with_spectrum(s, 7, generator())
    q = Quadratic(torch.full((4, 7), 3.0, dtype=torch.float64))
    torch.testing.assert_close(q.stable_step(g, polar(g)), 2 * s.mean(1) / 3.0)


def test_bound_holds_for_any_hessian():
    q = Quadratic(torch.rand(5, 8, generator=generator(), dtype=torch.float64) + 0.01)
    g = gaussian((50, 5, 8), generator(1))
    s_mean = torch.linalg.svdvals(g).mean(-1)
    assert (q.stable_step(g, polar(g)) >= 2 * s_mean / q.smoothness).all()


def test_with_spectrum_has_that_spectrum():
    s = torch.tensor([[3.0, 2.0, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(with_spectrum(s, 5, generator())), s)


def test_log_spaced_ends():
    values = log_spaced(1e3, 7)
    assert values[0].item() == pytest.approx(1e-3) and values[-1].item() == 1.0
    torch.testing.assert_close(values[1:] / values[:-1], torch.full((6,), 1e3 ** (1 / 6), dtype=torch.float64))


def test_predicted_ratio_by_hand():
    # mean 1.5, mean of cubes 4.5, mean of squares 2.5
    assert predicted_ratio(torch.tensor([1.0, 2.0], dtype=torch.float64)).item() == pytest.approx(1.5 * 4.5 / 2.5**2)
    assert predicted_ratio(torch.full((9,), 4.0)).item() == pytest.approx(1.0)


def test_predicted_ratio_is_scale_free_and_at_least_one():
    s = torch.rand(200, 12, generator=generator(), dtype=torch.float64)
    assert (predicted_ratio(s) >= 1).all()  # Cauchy-Schwarz: mean(s^2)^2 <= mean(s) mean(s^3)
    torch.testing.assert_close(predicted_ratio(s), predicted_ratio(17 * s))


def test_newton_direction_has_efficiency_one_and_nothing_more():
    q = kronecker(4, 6, 30.0, 5.0)
    d = gaussian((3, 4, 6), generator())
    torch.testing.assert_close(q.efficiency(d, d), torch.ones(3, dtype=torch.float64))
    assert (q.efficiency(d, gaussian((3, 4, 6), generator(1))) < 1).all()


def test_efficiency_is_the_decrease_of_a_line_search():
    q = kronecker(4, 6, 30.0, 5.0)
    d = gaussian((1, 4, 6), generator())
    x = polar(q.gradient(d))
    eta = line_search(q, q.gradient(d), x, 0, torch.arange(1))
    after = q.value(d - eta[:, None, None] * x)
    torch.testing.assert_close(1 - after / q.value(d), q.efficiency(d, x))


def test_formula_in_its_limit():
    # kappa(B) = 1 and m << n: measured and predicted agree to the sampling error sqrt(m / n)
    q = kronecker(4, 4096, 50.0, 1.0)
    d = gaussian((5, 4, 4096), generator())
    predicted = predicted_ratio(torch.linalg.svdvals(q.gradient(d)))
    assert ((measured_ratio(q, d) / predicted - 1).abs() < 0.01).all()


def test_alignment_formula():
    a = log_spaced(40.0, 4)
    assert aligned_ratio(a, 0.0) == pytest.approx(1.0)
    assert aligned_ratio(a, 1.0) == pytest.approx(float(predicted_ratio(a)))
    q = Quadratic(torch.outer(a, torch.ones(4096, dtype=torch.float64)))
    for s in (-0.5, 0.0, 0.5, 1.0):
        d = a[:, None] ** (s - 1) * gaussian((3, 4, 4096), generator())
        assert float(measured_ratio(q, d).mean()) == pytest.approx(aligned_ratio(a, s), rel=0.02)


def test_polar_of_wide_is_the_polar_factor():
    g = gaussian((3, 4, 9), generator())
    torch.testing.assert_close(polar_of_wide(g), polar(g))


def test_iterations_known_cases():
    flat = kronecker(3, 5, 1.0, 1.0)
    start = gaussian((2, 3, 5), generator())
    assert iterations(flat, start, steepest, constant(1.0), 1e-4, 10).tolist() == [1, 1]
    assert iterations(flat, start, steepest, constant(2.5), 1e-4, 40).tolist() == [math.inf, math.inf]
    orthogonal = with_spectrum(torch.ones(1, 3, dtype=torch.float64), 5, generator())
    assert iterations(flat, orthogonal, polar, guaranteed(), 1e-4, 10).tolist() == [1]


def test_a_run_does_not_depend_on_its_neighbours():
    q = kronecker(4, 6, 20.0, 3.0)
    start = gaussian((3, 4, 6), generator())
    eta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rho = torch.tensor([0.6, 0.9, 0.8], dtype=torch.float64)
    together = iterations(q, start, polar, annealed(eta, rho), 1e-3, 200)
    alone = [
        iterations(q, start[i : i + 1], polar, annealed(eta[i : i + 1], rho[i : i + 1]), 1e-3, 200).item()
        for i in range(3)
    ]
    assert together.tolist() == alone
    assert len(set(alone)) > 1


def test_frobenius_matched_has_muons_norm():
    x = frobenius_matched(gaussian((2, 4, 9), generator()))
    torch.testing.assert_close(inner(x, x), torch.full((2,), 4.0, dtype=torch.float64))
