"""What rounding alone does to a written weight raises no alarm, and what a fault does to it raises one."""

from __future__ import annotations

import pytest
import torch

from muon_dist.audit.recompute import Hyperparameters
from muon_dist.audit.tolerance import Precision, tolerance_of
from muon_dist.audit.written import Written


def written(lr: float, weight_decay: float, decayed_by: float, dtype: torch.dtype, seed: int) -> Written:
    """One step in `dtype` on weights of the size of a trained model's. It applies the decay `decayed_by`."""
    generator = torch.Generator().manual_seed(seed)
    old = (0.03 * torch.randn(64, 128, generator=generator)).to(dtype)
    update = (lr * 0.2 * torch.randn(64, 128, generator=generator)).to(dtype)
    got = old.mul(1 - lr * decayed_by).sub_(update)
    asked = Hyperparameters(rule="muon", lr=lr, weight_decay=weight_decay)
    precision = Precision(weight=dtype)
    return Written.part(old, got, update, 1 - lr * weight_decay, asked, precision, tolerance_of(precision))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_last_steps_of_a_schedule_are_right(dtype: torch.dtype) -> None:
    """As lr falls to 0, the factor of decay comes near 1, where fp32 has few numbers: of 1 - 1.35e-7 it makes
    1 - 1.19e-7, of 1 - 2e-8 it makes 1."""
    lrs = [10**-x for x in torch.linspace(2, 9, 141).tolist()]
    wrong = [lr for lr in (*lrs, 1.35e-6) for seed in range(4) if written(lr, 0.1, 0.1, dtype, seed).wrong]
    assert wrong == []


@pytest.mark.parametrize("decayed_by", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("lr", [1e-2, 1e-4, 2e-5])
def test_another_decay_is_seen(lr: float, decayed_by: float) -> None:
    """Missing, four fifths, doubled."""
    assert written(lr, 0.1, decayed_by, torch.float32, 0).wrong
