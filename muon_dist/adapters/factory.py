"""`MuonFactory`: makes a `Muon` from a model, for the factory hook of the Hugging Face Trainer."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from muon_dist.errors import ConfigError
from muon_dist.optim.calls import called_as
from muon_dist.optim.groups import check_parameters, param_groups, routing_for
from muon_dist.optim.muon import Muon
from muon_dist.optim.other_names import arguments_of, refuse_arguments
from muon_dist.optim.rules import RULES
from muon_dist.optim.rules.choice import check_options
from muon_dist.optim.rules.entries import group_rules, override_rules, split_rules
from muon_dist.routing import announce, is_rank_zero


@called_as("muon_dist.for_trainer(args), with the TrainingArguments of the Trainer")
def for_trainer(args: Any, **options: Any) -> tuple[type[MuonFactory], dict[str, Any]]:
    """The value for `optimizer_cls_and_kwargs` of a stock Trainer. Checks the Trainer's arguments now.

        trainer = Trainer(model, args, optimizer_cls_and_kwargs=muon_dist.for_trainer(args), ...)

    Args:
        args: the `TrainingArguments` of that Trainer. Muon uses its `learning_rate` and `weight_decay` unless
            `options` has `lr` and `weight_decay`. They are read when the Trainer creates the optimizer, so a
            hyper-parameter search can still change them.
        options: arguments of `muon_dist.param_groups` and `muon_dist.Muon`, such as `adamw_lr` and `groups`, and
            `print_routing`.

    Raises:
        ConfigError: an option is unknown, or `args` is not a TrainingArguments.
        FrameworkError: the DeepSpeed configuration of `args` has an "optimizer" or "scheduler" block that would
            replace Muon or its learning rates, or offload settings that would.
    """
    split_kwargs(options)
    if not hasattr(args, "learning_rate"):
        raise ConfigError(
            f"for_trainer takes the TrainingArguments of the Trainer, and this is a {type(args).__name__}: write "
            "for_trainer(args)"
        )
    check_trainer(args)
    return MuonFactory, {"training_arguments": args, **options}


def check_trainer(args: Any) -> None:
    """Check that a Trainer with `args` keeps Muon and its learning rates.

    Warns on the first rank if the Trainer would ignore FSDP.

    Raises:
        FrameworkError: under DeepSpeed the Trainer would replace Muon or its learning rates.
    """
    asked = getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if asked and args.device.type == "cpu" and is_rank_zero():
        warnings.warn(
            "fsdp has no effect on a CPU: accelerate runs DistributedDataParallel there, with the whole model on each "
            "rank. To shard the parameters on a CPU, use DeepSpeed's ZeRO stage 3 "
            "(deepspeed=configs/deepspeed/zero3.json), or load the model with "
            "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))",
            RuntimeWarning,
            stacklevel=3,
        )
    holders: tuple[Any, ...] = (
        getattr(args, "hf_deepspeed_config", None),  # args.deepspeed
        getattr(getattr(args, "deepspeed_plugin", None), "hf_ds_config", None),  # accelerate launch
    )
    for holder in holders:
        if getattr(holder, "config", None) is not None:
            _check_deepspeed(holder.config)


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    from muon_dist.adapters.deepspeed import check_config  # imports DeepSpeed, which the Trainer is about to use

    check_config(config)


def trainer_defaults(args: Any, options: Mapping[str, Any]) -> dict[str, float]:
    """Default options from `TrainingArguments`: the learning rate and the weight decay.

    `args.weight_decay` is for all parameters. If the optimizer's rule has no weight decay, it is only for AdamW.

    Raises:
        ConfigError: in this case an entry of `groups` has a rule with weight decay, but no `weight_decay`.
    """
    if not _decays(options.get("rule", "muon")):
        for number, entry in enumerate(group_rules(options.get("groups", ()), options["rule"])):
            if _decays(entry.options.get("rule", options["rule"])) and "weight_decay" not in entry.options:
                raise ConfigError(
                    f"groups[{number}] ({entry.pattern!r}): its rule has weight decay, but the optimizer's rule "
                    f"({options['rule']}) has none, so only AdamW gets the Trainer's: write weight_decay here too"
                )
        return {"lr": args.learning_rate, "adamw_weight_decay": args.weight_decay}
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay}


def _decays(rule: Any) -> bool:
    """Whether a rule has weight decay. True for an unknown rule, which is an error later."""
    return rule not in RULES or "weight_decay" not in RULES[rule].refused


class MuonFactory:
    """Creates a `Muon` for a model, through the factory hook of a stock Trainer; see `for_trainer`.

    The keyword arguments are those of `muon_dist.param_groups` and of `muon_dist.Muon`. On the first rank it prints
    the routing table unless `print_routing=False`. It is no Optimizer subclass, because for one Trainer would make its
    own parameter groups.
    """

    def __call__(
        self, opt_model: nn.Module, *, print_routing: bool = True, training_arguments: Any = None, **kwargs: Any
    ) -> Muon:
        """The optimizer for `opt_model`.

        Args:
            opt_model: the model.
            print_routing: print the routing table on the first rank.
            training_arguments: `TrainingArguments`, or a function that returns them, for the default `lr` and
                `weight_decay`.
            kwargs: arguments of `param_groups` and `Muon`.

        Raises:
            ConfigError: an unknown argument, or no learning rate.
            RoutingError: as `route` does.
        """
        if callable(training_arguments):
            training_arguments = training_arguments()
        if training_arguments is not None:
            kwargs = {**trainer_defaults(training_arguments, kwargs), **kwargs}
        if "lr" not in kwargs:
            raise ConfigError(
                "MuonFactory needs lr: use optimizer_cls_and_kwargs=muon_dist.for_trainer(args), which uses the "
                "learning_rate of args, or (MuonFactory, {'lr': 0.003})"
            )
        of_groups, of_muon = split_kwargs(kwargs)
        of_groups.setdefault("partitions", _partitions(_deepspeed_config()))
        check_parameters(opt_model)
        given = {name: of_groups.pop(name, ()) for name in ("overrides", "splits", "groups")}
        made = of_groups.pop("table", None)
        table = routing_for(opt_model, **given, table=made, rule=kwargs.get("rule", "muon"))
        if made is None or print_routing:
            announce(table, show=print_routing, again=True)
        return Muon(param_groups(opt_model, table=table, **of_groups), **of_muon)


def _deepspeed_config() -> dict[str, Any] | None:
    """The Trainer's DeepSpeed configuration, if any.

    Raises FrameworkError if the Trainer would give DeepSpeed another optimizer than the new Muon.
    """
    integration = sys.modules.get("transformers.integrations.deepspeed")
    config = integration.deepspeed_config() if integration is not None else None
    if config is not None:
        _check_deepspeed(config)
    return config


def _partitions(config: Mapping[str, Any] | None) -> int | None:
    """Number of ranks over which ZeRO stage 1 or 2 will shard the Muon group; None if the order has no effect."""
    zero = (config or {}).get("zero_optimization") or {}
    if zero.get("stage") not in (1, 2) or zero.get("round_robin_gradients", False):
        return None
    if not torch.distributed.is_initialized():
        return None
    tensor = int((config.get("tensor_parallel") or {}).get("autotp_size", 1) or 1) if config else 1
    return torch.distributed.get_world_size() // max(tensor, 1)


def split_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of `param_groups` and those of `Muon`; a shared argument goes to both.

    Raises ConfigError for an unknown argument (with its replacement), an option that the update rule does not have, or
    an invalid entry of `groups`, `overrides` or `splits`.
    """
    for_groups = arguments_of(param_groups)
    for_muon = arguments_of(Muon) - {"groups"}  # `groups` is an argument of param_groups here
    refuse_arguments("arguments for Muon", kwargs, for_groups | for_muon | {"print_routing"})
    of_muon = {k: v for k, v in kwargs.items() if k in for_muon}
    check_options({"rule": "muon", "rule_options": {}, **{k: v for k, v in of_muon.items() if v is not None}})
    group_rules(kwargs.get("groups", ()), kwargs.get("rule", "muon"))
    override_rules(kwargs.get("overrides", ()))
    split_rules(kwargs.get("splits", ()))
    return {k: v for k, v in kwargs.items() if k in for_groups}, of_muon
