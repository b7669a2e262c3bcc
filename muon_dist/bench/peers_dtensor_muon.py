"""The package dtensor-muon. Its Newton-Schulz calls a Triton kernel, which is switched off without a GPU."""

from __future__ import annotations

from functools import partial

import dtensor_muon as theirs
import dtensor_muon.optim.optim as optim
import dtensor_muon.orthogonalize.orthogonalize as iteration
import torch
from torch import nn

from muon_dist.bench.cases import LR, MOMENTUM, Case
from muon_dist.bench.sides import Built, Calls, split


def build(model: nn.Module, case: Case) -> Built:
    """Keller Jordan's coefficients and no weight decay, so that its rule equals ours; it always computes in bf16."""
    muon, others = split(model)
    triton = torch.cuda.is_available()
    optim.zeropower = partial(iteration.zeropower, use_triton=triton)
    calls = Calls(iteration, "ns_loop_triton" if triton else "ns_loop")
    groups = [
        {"params": muon, "algorithm": "muon", "momentum": MOMENTUM, "orthogonalization_strategy": "newton_schulz"},
        {"params": others, "algorithm": "adamw"},
    ]
    return Built([theirs.Muon(groups, lr=LR, wd=0.0, use_cautious_wd=False)], calls, "spectral")
