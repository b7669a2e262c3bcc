"""torch.optim.Muon, with torch.optim.AdamW for parameters that are not matrices."""

from __future__ import annotations

import torch
import torch.optim._muon as theirs
from torch import nn

from muon_dist.bench.cases import LR, MOMENTUM, Case
from muon_dist.bench.sides import Built, Calls, split


def build(model: nn.Module, case: Case) -> Built:
    """Builds the optimizer. It computes in bf16 in every case."""
    muon, others = split(model)
    calls = Calls(theirs, "_zeropower_via_newtonschulz")
    optimizers = [
        torch.optim.Muon(muon, lr=LR, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    return Built(optimizers, calls, "match_rms_adamw")
