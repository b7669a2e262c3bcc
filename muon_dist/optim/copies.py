"""Copies of the optimizer, by `copy.deepcopy` and pickle, and loading of a state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError
from muon_dist.exchange.progress import Progress
from muon_dist.optim.guard import StepGuard
from muon_dist.optim.low_precision import MASTER, wide_state
from muon_dist.optim.planning import check_saved_groups
from muon_dist.optim.state import (
    MOMENTUM,
    Loaded,
    indexed_parameters,
    install,
    is_own,
    partial_momentum,
    put,
    settle,
    split_state,
)

MUON = "muon"
"""Key of the entry that `packed` adds to the state of a `torch.optim.Optimizer`."""
_AS_THEY_ARE = ("process_group", "_options", "specs", "algorithms", "_kinds", "_rules", "_default_rule")


def packed(optimizer: Any) -> dict[str, Any]:
    """Groups, state and options for a copy of a Muon. The copy makes its own plan at its first step.

    The plan, `diagnostics`, `audit`, and callbacks of `guard` and `progress` stay with the original.

    Raises:
        ConfigError: the optimizer was made with `process_group`, which cannot be copied.
    """
    if isinstance(optimizer.process_group, dist.ProcessGroup):
        raise ConfigError(
            "an optimizer with process_group= cannot be copied or pickled, because a process group cannot: copy "
            "state_dict() and load it into a new optimizer with that group"
        )
    partial: dict[int, list[str]] = {}
    if optimizer.runtime is not None:
        settle(optimizer.runtime, optimizer.state)
        partial = partial_momentum(optimizer.runtime, indexed_parameters(optimizer))
    kept = {name: getattr(optimizer, name) for name in _AS_THEY_ARE}
    guard = optimizer.guard
    mine = {"kept": kept, "partial": partial, "guard": (guard.max_nonfinite, guard.state_dict())}
    return {**torch.optim.Optimizer.__getstate__(optimizer), MUON: mine}


def unpack(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore a Muon from the result of `packed`. `optimizer` has its groups and state already."""
    mine = state[MUON]
    for name, value in mine["kept"].items():
        setattr(optimizer, name, value)
    most, counters = mine["guard"]
    optimizer.guard = StepGuard(most)
    optimizer.guard.load_state_dict(counters)
    optimizer.progress, optimizer.diagnostics, optimizer.audit = Progress(), None, None
    optimizer._groups = list(optimizer.param_groups)
    optimizer._runtime = optimizer._gathered = None
    optimizer._copies_compared = optimizer._warned_of_partial_state = False
    loaded = {}
    for index, p in enumerate(indexed_parameters(optimizer)):
        own = {key: value for key, value in optimizer.state.get(p, {}).items() if is_own(key)}
        if own:
            loaded[p] = Loaded(own.pop(MOMENTUM, None), mine["partial"].get(index), own)
    optimizer._loaded = loaded or None


def load(optimizer: Any, state_dict: dict[str, Any], torchs: Callable[[dict[str, Any]], None]) -> None:
    """Load a state dict by `torchs`, the `load_state_dict` of `torch.optim.Optimizer`, without casting momentum.

    Torch would cast momentum to the parameter's dtype. So a load hook removes it from the state dict before torch
    loads, and another puts it into the state afterwards. They are the last pre-hook and the first post-hook: users'
    hooks see momentum in the state dict and in `optimizer.state`, and the state dict that they return is loaded. All
    checks run before anything changes.
    """
    loaded: dict[torch.Tensor, Loaded] = {}
    wide: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    empty = True

    def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal empty
        check_saved_groups(given["param_groups"], optimizer._groups, optimizer.algorithms, optimizer.specs)
        parameters = indexed_parameters(optimizer)
        found, rest = split_state(parameters, given)
        for of_p in found.values():
            of_p.memory.pop(MASTER, None)
        loaded.update(found)
        wide.update(wide_state(optimizer._options, given, parameters))
        empty = not given["state"]
        return rest

    def give(_: Any) -> None:
        optimizer._groups = list(optimizer.param_groups)
        optimizer._loaded = None if empty else loaded
        for p, of_p in loaded.items():
            put(optimizer.state, p, of_p.entries())
        for p, kept in wide.items():
            optimizer.state[p].update(kept)
        if optimizer.audit is not None:
            optimizer.audit.forget()
        if optimizer.runtime is not None:
            install(optimizer.runtime, optimizer.state, optimizer._loaded)
            optimizer._loaded = None

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),  # the last of all
        optimizer.register_load_state_dict_post_hook(give, prepend=True),
    ]
    try:
        torchs(state_dict)
    finally:
        for handle in handles:
            handle.remove()
