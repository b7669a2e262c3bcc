"""What pure bfloat16 weights lose, and what fp32 masters and stochastic rounding keep.

    python -m tests.optim.low_precision        # the table of docs/low-precision.md, on one core in half a minute

1,000 steps of a 64 x 64 matrix under Muon and of a vector under AdamW, with weights of size 1: with gradients of zero,
so that only the decay acts; and with one constant gradient, without decay.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from muon_dist import Muon

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, `stochastic_rounding`": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, `master_weights`": (torch.bfloat16, {"master_weights": True}),
}


def optimizer_of(way: str, lr: float, weight_decay: float) -> tuple[Muon, list[torch.nn.Parameter]]:
    dtype, options = WAYS[way]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((64, 64), (4096,))]
    groups: list[dict[str, Any]] = [
        {"params": [weights[0]], "param_names": ["matrix"]},
        {"params": [weights[1]], "param_names": ["vector"], "algorithm": "adamw"},
    ]
    return Muon(groups, lr=lr, weight_decay=weight_decay, process_group=None, **options), weights


def decayed(way: str, steps: int = 1000) -> list[float]:
    """Share of their norms that matrix and vector keep in `steps` of lr 1e-2 and decay .1 with zero gradients."""
    optimizer, weights = optimizer_of(way, 1e-2, 0.1)
    before = [float(w.detach().float().norm()) for w in weights]
    for _ in range(steps):
        for w in weights:
            w.grad = torch.zeros_like(w)
        optimizer.step()
    return [float(w.detach().float().norm()) / b for w, b in zip(weights, before, strict=True)]


def moved(way: str, steps: int = 1000) -> list[float]:
    """Way of matrix and vector in `steps` of lr 1e-4 with a constant gradient, relative to that in fp32."""
    found = []
    for chosen in (way, "fp32"):
        optimizer, weights = optimizer_of(chosen, 1e-4, 0.0)
        before = [w.detach().float().clone() for w in weights]
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(w.shape, generator=generator) for w in weights]
        for _ in range(steps):
            for w, g in zip(weights, gradients, strict=True):
                w.grad = g.to(w.dtype)
            optimizer.step()
        found.append([w.detach().float() - b for w, b in zip(weights, before, strict=True)])
    return [float((a * b).sum() / (b * b).sum()) for a, b in zip(*found, strict=True)]


def main() -> None:
    warnings.simplefilter("ignore")
    print("| weights | decay, Muon | decay, AdamW | way at lr 1e-4, Muon | AdamW |\n|---|---|---|---|---|")
    for way in WAYS:
        print(f"| {way} | " + " | ".join(f"{x:.4f}" for x in (*decayed(way), *moved(way))) + " |")


if __name__ == "__main__":
    main()
