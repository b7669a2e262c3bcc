"""The package muon-fsdp2."""

from __future__ import annotations

import muon_fsdp2 as theirs
from torch import nn

from muon_dist.bench.cases import LR, MOMENTUM, Case
from muon_dist.bench.sides import Built, Calls, split


def build(model: nn.Module, case: Case) -> Built:
    """Builds the optimizer. It computes in bf16 in every case."""
    muon, others = split(model)
    calls = Calls(theirs, "zeropower_via_newtonschulz5")
    groups = [
        {"params": muon, "use_muon": True, "lr": LR, "momentum": MOMENTUM, "rms_scale": True},
        {"params": others, "use_muon": False, "lr": LR, "betas": (0.9, 0.95)},
    ]
    return Built([theirs.Muon(groups)], calls, "match_rms_adamw")
