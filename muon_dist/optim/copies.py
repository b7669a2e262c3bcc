"""Copies of the optimizer: `copy.deepcopy`, and pickle."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError
from muon_dist.exchange.progress import Progress
from muon_dist.optim.guard import StepGuard
from muon_dist.optim.state import MOMENTUM, Loaded, indexed_parameters, is_own, keep_resting, partial_momentum

MUON = "muon"
"""Key of what `packed` adds to the state of a `torch.optim.Optimizer`."""
_AS_THEY_ARE = ("process_group", "_options", "specs", "algorithms", "_rules", "_default_rule")


def packed(optimizer: Any) -> dict[str, Any]:
    """What a copy of a Muon is made of: groups, state, options. It plans for itself, at its own first step.

    The plan, `diagnostics`, and what others have hung on `guard` and `progress` stay with the original.

    Raises:
        ConfigError: the optimizer has a process group of its own, which cannot be copied.
    """
    if isinstance(optimizer.process_group, dist.ProcessGroup):
        raise ConfigError(
            "an optimizer with process_group= cannot be copied or pickled, since a process group cannot: copy "
            "state_dict() and load it into an optimizer that is made with that group"
        )
    partial: dict[int, list[str]] = {}
    if optimizer.runtime is not None:
        keep_resting(optimizer.runtime, optimizer.state)
        partial = partial_momentum(optimizer.runtime, indexed_parameters(optimizer))
    kept = {name: getattr(optimizer, name) for name in _AS_THEY_ARE}
    guard = optimizer.guard
    mine = {"kept": kept, "partial": partial, "guard": (guard.max_nonfinite, guard.state_dict())}
    return {**torch.optim.Optimizer.__getstate__(optimizer), MUON: mine}


def unpack(optimizer: Any, state: dict[str, Any]) -> None:
    """Make `optimizer`, which has its groups and state already, a Muon of what `packed` returned."""
    mine = state[MUON]
    for name, value in mine["kept"].items():
        setattr(optimizer, name, value)
    most, counters = mine["guard"]
    optimizer.guard = StepGuard(most)
    optimizer.guard.load_state_dict(counters)
    optimizer.progress, optimizer.diagnostics = Progress(), None
    optimizer._groups = list(optimizer.param_groups)
    optimizer._runtime = optimizer._gathered = None
    optimizer._copies_compared = optimizer._warned_of_partial_state = False
    loaded = {}
    for index, p in enumerate(indexed_parameters(optimizer)):
        own = {key: value for key, value in optimizer.state.get(p, {}).items() if is_own(key)}
        if own:
            loaded[p] = Loaded(own.pop(MOMENTUM, None), mine["partial"].get(index), own)
    optimizer._loaded = loaded or None
