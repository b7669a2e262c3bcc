"""Rows of the table of bad input that have no test elsewhere: dtypes, zero and deficient matrices, idle experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from muon_dist.optim import Muon
from tests.distributed import run_ranks
from tests.optim.test_muon import Reference, assert_close, gradients, make_groups, make_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_any_dtype(dtype: torch.dtype) -> None:
    """Momentum is fp32 whatever the gradient's dtype, and a norm that fp16 cannot hold stops nothing."""
    p = torch.nn.Parameter(torch.eye(64, dtype=dtype))
    optimizer = Muon([p], lr=0.02, ns_dtype=torch.float32, weight_decay=0.0)
    p.grad = torch.full((64, 64), 6e4, dtype=dtype) * torch.eye(64, dtype=dtype) + 6e4 * torch.ones(
        64, 64, dtype=dtype
    )
    p.grad = p.grad.clamp(max=6e4)
    assert dtype != torch.float16 or torch.isinf(p.grad.norm())
    optimizer.step()
    assert optimizer.guard.applied and optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert torch.isfinite(p).all() and not torch.equal(p, torch.eye(64, dtype=dtype))


def test_a_zero_matrix_only_decays() -> None:
    p = torch.nn.Parameter(torch.ones(8, 16))
    optimizer = Muon([p], lr=0.5, weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.zeros(8, 16)
        optimizer.step()
    expected = torch.ones(8, 16)
    for _ in range(3):
        expected.mul_(1 - 0.5 * 0.1)
    assert torch.equal(p.detach(), expected)


def test_momentum_of_deficient_rank() -> None:
    """Rank one: finite in fp32, and the update has the one direction that there is."""
    u, v = torch.randn(24, 1), torch.randn(1, 40)
    p = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, scale="none", ns_dtype=torch.float32)
    p.grad = u @ v
    optimizer.step()
    values = torch.linalg.svdvals(p.detach())
    assert 0.6 < values[0] < 1.3 and values[1] < 1e-3


def idle_expert() -> dict[str, torch.Tensor]:
    """Rank 0's tokens reach experts 0 and 1, nobody's reach expert 3: its part of the gradient is zero."""
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02)
    for step in range(3):
        for name, g in gradients(step).items():
            parameters[name].grad = g
        experts = parameters["experts"].grad
        experts[3] = 0
        if dist.get_rank() == 1 and step == 1:
            parameters["experts"].grad = None  # no token of this rank reached any expert
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}


def test_an_expert_that_saw_no_token() -> None:
    """It decays and is not moved otherwise; the ranks stay equal and nobody waits."""
    results = run_ranks(idle_expert, 2, timeout=20)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    start = make_parameters()["experts"].detach()[3]
    for _ in range(3):
        start = start * (1 - 0.02 * 0.1)
    assert torch.equal(results[0]["experts"][3], start)
    reference = Reference(lr=0.02, weight_decay=0.1)
    for step in range(3):
        reference.step(gradients(step))
    others = {n: p for n, p in reference.parameters.items() if n != "experts"}
    assert_close(results[0], others, 1e-6)
