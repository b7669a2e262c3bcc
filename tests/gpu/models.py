"""Weights and gradients of the tests on a device."""

from __future__ import annotations

from typing import Any

import torch

from muon_dist import Muon

SHAPES = [*[(256, 256)] * 4, *[(688, 256)] * 2, (256, 688), (130, 64)]
STEPS = 4


def parameters(device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator) for s in SHAPES]


def optimizer(weights: list[Any], **options: Any) -> Muon:
    names = [f"w{i}.weight" for i in range(len(weights))]
    group = {"params": weights, "param_names": names, "algorithm": "muon"}
    return Muon([group], **{"lr": 0.02, "ns_dtype": torch.float32, **options})


def alone(device: torch.device, steps: int = STEPS, **options: Any) -> list[torch.Tensor]:
    """The weights of one process after some steps."""
    weights = parameters(device)
    muon = optimizer(weights, process_group=None, **options)
    for step in range(steps):
        for p, g in zip(weights, gradients(step), strict=True):
            p.grad = g.to(device)
        muon.step()
    return [w.detach().cpu() for w in weights]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative Frobenius error."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()) for a, b in pairs)
