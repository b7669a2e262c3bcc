"""The plain step against torch's own optimizers, which share no line with it."""

from __future__ import annotations

import pytest
import torch

from muon_dist.audit.recompute import Before, Hyperparameters, plain_step, scale_factor


def test_adamw_is_torchs():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    asked = Hyperparameters(rule="adamw", lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    before = Before(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p.detach()), {
        "exp_avg_sq": torch.zeros_like(p.detach()), "step": torch.tensor(0.0)})  # fmt: skip
    for _ in range(4):
        p.grad = torch.randn_like(p)
        step = plain_step(Before(before.weight, p.grad, before.momentum, before.memory), asked)
        optimizer.step()
        assert torch.allclose(step.weight, p.detach(), rtol=1e-12, atol=1e-14)
        before = Before(step.weight, p.grad, step.momentum, step.memory)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov):
    """torch.optim.Muon iterates in bfloat16, so only to that."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 40))
    optimizer = torch.optim.Muon([p], lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    asked = Hyperparameters(lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=nesterov, scale="spectral")
    weight, momentum = p.detach().clone(), torch.zeros(24, 40)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        step = plain_step(Before(weight, p.grad, momentum), asked)
        optimizer.step()
        update = (step.weight - step.decay * weight).norm()
        assert (step.weight - p.detach()).norm() < 0.03 * update
        weight, momentum = p.detach().clone(), step.momentum


def test_a_transposed_matrix_swaps_its_sides():
    assert scale_factor("spectral", 8, 32) == 1.0
    assert scale_factor("spectral", 8, 32, transposed=True) == 2.0
