"""Schedulers of torch reach every group: rates, and momentum where they cycle it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

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


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda step: 0.9),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), ConstantLR(o, 0.5)], milestones=[3]),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
    "SWALR": lambda o: SWALR(o, swa_lr=0.002, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_gives_the_rates_that_it_gives_any_optimizer(name: str) -> None:
    """And the step uses them: AdamW's half equals torch's, Muon's moves by its rate."""
    optimizer = made()
    muon, adamw = (group["params"][0] for group in optimizer.param_groups)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (muon, adamw)]
    groups = [{"params": [twins[0]], "lr": 0.1}, {"params": [twins[1]], "lr": 0.01}]
    other = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, other)]
    lengths = []
    for step in range(8):
        for p in (muon, adamw, *twins):
            p.grad = torch.full_like(p, 1.0 + step)
        before = muon.detach().clone()
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        other.step()
        lengths.append(float((muon.detach() - before * (1 - 0.1 * rate)).norm()) / rate)
        for scheduler in schedulers:
            scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert torch.equal(adamw, twins[1])
    assert max(lengths) < 1.001 * min(lengths)  # the same gradient's direction each time, so a step is as long as lr
