"""Schedulers of torch reach every group: rates, and momentum where they cycle it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from muon_dist import Muon


def made() -> Muon:
    weight, bias = torch.nn.Parameter(torch.eye(4)), torch.nn.Parameter(torch.zeros(4))
    groups: list[dict[str, Any]] = [
        {"params": [weight], "param_names": ["w"], "lr": 0.1},
        {"params": [bias], "param_names": ["b"], "algorithm": "adamw", "lr": 0.01},
    ]
    return Muon(groups, momentum=0.95, betas=(0.9, 0.95))


def cycled(scheduler: Any, optimizer: Muon, steps: int) -> list[tuple[float, float, float]]:
    """Muon's rate, Muon's momentum and AdamW's beta1 in each step."""
    seen = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        muon, adamw = optimizer.param_groups
        seen.append((muon["lr"], muon["momentum"], adamw["betas"][0]))
        scheduler.step()
    return seen


def test_one_cycle_cycles_the_momentum_of_both() -> None:
    optimizer = made()
    scheduler = OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=20, base_momentum=0.85, max_momentum=0.95)
    seen = cycled(scheduler, optimizer, 20)
    assert all(momentum == beta1 for _, momentum, beta1 in seen)
    assert min(m for _, m, _ in seen) < 0.86 and max(m for _, m, _ in seen) > 0.94
    assert max(lr for lr, *_ in seen) > 0.099


def test_cyclic_rates_cycle_the_momentum_of_both() -> None:
    optimizer = made()
    scheduler = CyclicLR(optimizer, [0.01, 0.001], [0.1, 0.01], step_size_up=4, base_momentum=0.8, max_momentum=0.9)
    seen = cycled(scheduler, optimizer, 10)
    assert all(momentum == beta1 for _, momentum, beta1 in seen)
    assert {round(m, 3) for _, m, _ in seen} >= {0.8, 0.9}


def test_without_such_a_scheduler_momentum_is_its_own() -> None:
    optimizer = made()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert {(momentum, beta1) for _, momentum, beta1 in cycled(scheduler, optimizer, 5)} == {(0.95, 0.9)}
    optimizer.param_groups[0]["momentum"] = 0.8
    assert {(momentum, beta1) for _, momentum, beta1 in cycled(scheduler, optimizer, 2)} == {(0.8, 0.9)}


def test_a_loaded_state_keeps_its_momentum() -> None:
    optimizer, again = made(), made()
    scheduler = OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=20)
    cycled(scheduler, optimizer, 5)
    again.load_state_dict(optimizer.state_dict())
    for group, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert (group["momentum"], group["betas"]) == (other["momentum"], other["betas"])
