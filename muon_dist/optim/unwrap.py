"""The optimizer inside the wrappers of accelerate, DeepSpeed and others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from muon_dist.optim.muon import Muon


def layers(optimizer: Any) -> Iterator[Any]:
    """`optimizer`, the optimizer in its attribute `optimizer`, and so on down to the innermost one."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer of `optimizer`, which may be wrapped or not."""
    *_, innermost = layers(optimizer)
    assert isinstance(innermost, torch.optim.Optimizer)
    return innermost


def find_muon(optimizer: Any) -> Muon | None:
    """The `Muon` in `optimizer`; None if another optimizer is wrapped, or `optimizer` is None."""
    return next((layer for layer in layers(optimizer) if isinstance(layer, Muon)), None)
