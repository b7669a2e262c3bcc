"""`MuonFactory`: from a whole model to a `Muon`, for the factory hook of the Hugging Face Trainer."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from muon_dist.errors import ConfigError
from muon_dist.optim.groups import check_parameters, param_groups
from muon_dist.optim.muon import Muon
from muon_dist.routing import Override, SplitRule, route


def is_rank_zero() -> bool:
    """True on the first rank, and where nothing is distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


class MuonFactory:
    """Makes a `Muon` for a stock Trainer: `Trainer(..., optimizer_cls_and_kwargs=(MuonFactory, {"lr": 0.02}))`.

    The keyword arguments are those of `muon_dist.param_groups` and of `muon_dist.Muon`; `lr` is needed, since Trainer
    keeps its own `learning_rate` to itself here. `overrides` and `splits` may be plain dicts. On the first rank the
    routing table is printed unless `print_routing=False`. Not an Optimizer subclass: Trainer would flatten the model
    into its own parameter groups.
    """

    def __call__(self, opt_model: nn.Module, *, print_routing: bool = True, **kwargs: Any) -> Muon:
        """The optimizer for `opt_model`. Raises ConfigError for an unknown argument, RoutingError as `route` does."""
        if "lr" not in kwargs:
            raise ConfigError(
                "MuonFactory needs lr, for example optimizer_cls_and_kwargs=(MuonFactory, {'lr': 0.02}): Trainer does "
                "not pass its learning_rate to a factory"
            )
        of_groups, of_muon = split_kwargs(kwargs)
        of_groups.setdefault("partitions", _partitions(_deepspeed_config()))
        overrides = [_as(Override, o) for o in of_groups.pop("overrides", ())]
        splits = [_as(SplitRule, s) for s in of_groups.pop("splits", ())]
        check_parameters(opt_model)
        table = of_groups.pop("table", None) or route(opt_model, overrides, splits)
        if print_routing and is_rank_zero():
            print(table.render(), flush=True)
        return Muon(param_groups(opt_model, table=table, **of_groups), **of_muon)


def _deepspeed_config() -> dict[str, Any] | None:
    """The Trainer's DeepSpeed configuration, if any.

    Raises FrameworkError where the Trainer would hand DeepSpeed another optimizer than the one made here.
    """
    integration = sys.modules.get("transformers.integrations.deepspeed")
    config = integration.deepspeed_config() if integration is not None else None
    if config is not None:
        from muon_dist.adapters.deepspeed import check_config  # imports DeepSpeed, which the Trainer is about to use

        check_config(config)
    return config


def _partitions(config: Mapping[str, Any] | None) -> int | None:
    """The ranks over which ZeRO stage 1 or 2 will cut the Muon group; None where it keeps no given order."""
    zero = (config or {}).get("zero_optimization") or {}
    if zero.get("stage") not in (1, 2) or zero.get("round_robin_gradients", False):
        return None
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else None


def _as(cls: type, value: Any) -> Any:
    """A rule as its dataclass, from a plain mapping too."""
    return cls(**value) if isinstance(value, Mapping) else value


def _keywords(function: Callable[..., Any], skip: str) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name not in (skip, "self")}


def split_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keyword arguments into those of `param_groups` and those of `Muon` (a shared one goes to both).

    Raises ConfigError that names every unknown one with the closest known.
    """
    for_groups = _keywords(param_groups, "model")
    for_muon = _keywords(Muon, next(iter(inspect.signature(Muon).parameters)))
    known = for_groups | for_muon | {"print_routing"}
    problems = []
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            problems.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if problems:
        raise ConfigError(f"unknown argument for Muon: {', '.join(problems)}; known are {', '.join(sorted(known))}")
    return (
        {k: v for k, v in kwargs.items() if k in for_groups},
        {k: v for k, v in kwargs.items() if k in for_muon},
    )
