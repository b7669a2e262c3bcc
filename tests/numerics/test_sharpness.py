"""Stable steps against quadratics whose curvature is known, and Hessian-vector products against the Hessian."""

from __future__ import annotations

import math

import pytest
import torch

from muon_dist.numerics import polar_factor
from muon_dist.numerics.sharpness import Curvature, largest_eigenvalue, stable_step


def symmetric(eigenvalues: list[float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("eigenvalues", [[5.0, 1.0, 0.5, -3.0, -9.0], [2.0] * 4, [-1.0, -2.0], [1e-8, 3e-8]])
@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_largest_eigenvalue(eigenvalues: list[float], reorthogonalize: bool) -> None:
    h = symmetric(eigenvalues)
    found = largest_eigenvalue(lambda v: h @ v, h[0], 12, reorthogonalize=reorthogonalize)
    assert found == pytest.approx(max(eigenvalues), rel=1e-6)


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_many_steps_do_no_harm(reorthogonalize: bool) -> None:
    h = symmetric([10.0 * 0.9**i for i in range(60)])
    assert largest_eigenvalue(lambda v: h @ v, h[0], 60, reorthogonalize=reorthogonalize) == pytest.approx(
        10, rel=1e-9
    )


def test_the_largest_not_the_largest_in_magnitude_of_a_crowded_spectrum() -> None:
    h = torch.linspace(-3, 2, 30, dtype=torch.float64)
    assert largest_eigenvalue(lambda v: h * v, h, 30, reorthogonalize=True) == pytest.approx(2.0)


def test_threshold_is_where_the_loss_is_back() -> None:
    """R1: on f = 1/2 <D, H[D]>, H = A (x) B, one step of size eta* along the polar factor leaves f as it was."""
    torch.manual_seed(0)
    a, b = symmetric([4.0, 2.0, 1.0, 0.5], 1), symmetric([3.0, 1.0, 0.2], 2)
    d = torch.randn(4, 3, dtype=torch.float64)

    def product(v: torch.Tensor) -> torch.Tensor:
        return (a @ v.view(4, 3) @ b).reshape(-1)

    def f(x: torch.Tensor) -> float:
        return float(0.5 * x.reshape(-1) @ product(x.reshape(-1)))

    g = product(d.reshape(-1))
    o = polar_factor(g.view(4, 3))
    step = stable_step(g, o.reshape(-1), product, lanczos=12)
    singular = torch.linalg.svdvals(g.view(4, 3))
    assert step.slope == pytest.approx(float(singular.sum()))
    assert step.largest == pytest.approx(12.0, rel=1e-6)
    assert step.bound == pytest.approx(2 / 12.0 * float(singular.mean()), rel=1e-6)  # the paper's (2 / L) s_mean
    assert step.bound <= step.threshold == pytest.approx(2 * step.slope / (step.nds_update * 3))
    assert f(d - step.threshold * o) == pytest.approx(f(d))
    assert f(d - 0.9 * step.threshold * o) < f(d) < f(d - 1.1 * step.threshold * o)
    assert step.nds_gradient == pytest.approx(float(g @ product(g) / (g @ g)))


def test_no_bound_without_positive_curvature() -> None:
    step = stable_step(torch.ones(3), torch.ones(3), lambda v: -v, lanczos=3)
    assert math.isinf(step.bound) and math.isinf(step.threshold)
    assert step.nds_update == -1.0


def test_a_zero_gradient() -> None:
    step = stable_step(torch.zeros(3), torch.zeros(3), lambda v: v, lanczos=2)
    assert (step.slope, step.nds_update, step.nds_gradient) == (0.0, 0.0, 0.0)


def test_products_against_the_hessian() -> None:
    torch.manual_seed(0)
    w, v = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    x = torch.randn(5, 3)

    def loss(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w) @ v).square().mean()

    hessian = torch.autograd.functional.hessian(loss, (w, v))
    curvature = Curvature(loss(w, v), [w, v])
    dw, dv = torch.randn(3, 2), torch.randn(2)
    found = curvature.product([dw, dv])
    expected_w = torch.einsum("ijkl,kl->ij", hessian[0][0], dw) + torch.einsum("ijk,k->ij", hessian[0][1], dv)
    torch.testing.assert_close(found[0], expected_w)
    only = curvature.product([None, dv])
    assert only[0] is None
    torch.testing.assert_close(only[1], hessian[1][1] @ dv)


def test_refuses_two_lengths() -> None:
    with pytest.raises(ValueError, match="one length"):
        stable_step(torch.ones(2), torch.ones(3), lambda v: v)
